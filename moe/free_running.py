"""What a routing costs a model that goes on by itself, where nothing takes it back to a text: free-running decode.

``evaluate`` in moe/quality.py gives every token the right past, which hides what compounds. Here each prompt is
continued greedily, token by token, by a routing and by the unmodified model; the unmodified model scores both, and the
difference in bits a token is the routing's excess. It may be negative: a greedy continuation is not the likeliest one.

Each prompt begins with caches of its own, cold, and goes through the model in one call that fills them, as in ``load``.
So no prompt's figure depends on another's, and a bootstrap may draw prompts.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from operator import add

import torch

from cachemoe.kernels.policy import KNOBS
from cachemoe.moe.calibration import Calibration
from cachemoe.moe.chance import Chance, Changes, Counted, has_control
from cachemoe.moe.chooser import Chooser
from cachemoe.moe.layers import moe_layers, routing_rules
from cachemoe.moe.leveled import LeveledExperts
from cachemoe.moe.policies.rule import EXACT
from cachemoe.moe.progress import Progress
from cachemoe.moe.quality import (
    NATS_PER_BIT,
    Setting,
    batches_of,
    eviction_of,
    log_probabilities,
    router_of,
    rows_at_once,
    state_of,
)
from cachemoe.moe.shape import MoeShape
from cachemoe.moe.sizes import LevelBytes
from cachemoe.moe.sources import Ahead, gates_ahead
from cachemoe.moe.swap import RouteLayer, RunExperts, Swap
from cachemoe.offload.errors import InputError

PROMPT_TOKENS = 64
SHARE = 0.95  # of the bootstrap's means that lie in the interval
SEED, DRAWS = 0, 10_000


@dataclass(frozen=True)
class FreeRun:
    """What continuations of P prompts cost, in bits a token under the unmodified model.

    Args:
        prompt_tokens: T of a prompt.
        tokens: N of a continuation.
        own: ``[P]`` float64, of the unmodified model's own continuations.
        excess: of each setting ``[P]`` float64, what its continuations cost beyond these; None where it is exact, and
            has none by construction.
        controls: of each setting's control likewise; None where there is none.
    """

    prompt_tokens: int
    tokens: int
    own: torch.Tensor
    excess: list[torch.Tensor | None]
    controls: list[torch.Tensor | None]

    def summary(self) -> dict:
        """What reports say of all settings together."""
        return {
            "prompts": len(self.own),
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "interval_share": SHARE,
            "own_bits": float(self.own.mean()),
            "own_bits_of_prompts": self.own.tolist(),
        }

    def costs(self, i: int) -> dict | None:
        """What reports say of a setting; None where it is exact."""
        if self.excess[i] is None:
            return None
        control = self.controls[i]
        return figures(self.excess[i]) | {"control": None if control is None else figures(control)}


def figures(excess: torch.Tensor) -> dict:
    """What reports say of the excess bits ``[P]`` of each prompt."""
    return {
        "excess_bits": float(excess.mean()),
        "interval": bootstrap_interval(excess, SEED),
        "excess_bits_of_prompts": excess.tolist(),
    }


def prompts_of(tokens: torch.Tensor, prompts: int, count: int, shape: MoeShape) -> torch.Tensor:
    """``[P, PROMPT_TOKENS]`` of a text ``[T]``: each prompt begins one of P equal parts of it.

    Args:
        prompts: P.
        count: N, tokens that are to follow each.

    Raises:
        InputError: if N is below 1, the text is too short, or prompt and continuation are longer than the model's
            context.
    """
    if count < 1:
        raise InputError(f"--free is a number of tokens, 0 for none, not {count}")
    if shape.context is not None and PROMPT_TOKENS + count > shape.context:
        raise InputError(
            f"--free {count} after a prompt of {PROMPT_TOKENS} tokens is more than the {shape.context} tokens that the "
            "model takes"
        )
    if len(tokens) < prompts * PROMPT_TOKENS:
        raise InputError(
            f"{prompts} prompts of {PROMPT_TOKENS} tokens are more than the {len(tokens)} that this run has of the "
            "text: give fewer --prompts, more --tokens, or a longer text"
        )
    return tokens.unfold(0, PROMPT_TOKENS, len(tokens) // prompts)[:prompts]


@torch.inference_mode()
def run_freely(
    model,
    shape: MoeShape,
    prompts: torch.Tensor,
    count: int,
    settings: Sequence[Setting],
    evict: Callable,
    progress: Progress,
    calibration: Calibration | None = None,
    miss_cost: float = 0.0,
    leveled: LeveledExperts | None = None,
    level_bytes: LevelBytes = LevelBytes(),  # noqa: B008 (frozen)
) -> FreeRun:
    """Continue the prompts by the unmodified model and by every setting that is not exact, and score what they say.

    Beside each that has a control, by as many changes by chance, in prompts and in what follows.

    Args:
        model: the transformers model.
        prompts: ``[P, T]`` tokens.
        count: N, tokens that each is continued by; none ends one early.
        settings: strategies and capacities.
        evict: eviction policy.
        progress: shows each batch of continuations.
        calibration, miss_cost: as for ``Chooser``.
        leveled, level_bytes: as for ``evaluate``.

    Raises:
        InputError: if a strategy needs a calibration.
    """
    known = {"calibration": calibration, "miss_cost": miss_cost, "leveled": leveled, "level_bytes": level_bytes}
    at_once = rows_at_once(prompts.shape[1] + count, shape.vocabulary)

    def bits_of(continuations: torch.Tensor) -> torch.Tensor:
        parts = zip(prompts.split(at_once), continuations.split(at_once), strict=True)
        return torch.cat([continuation_bits(model, *part) for part in parts])

    parts = prompts.split(at_once)
    with progress("decoding freely: the unmodified model", count * len(parts)) as advance:
        own = bits_of(torch.cat([decode(model, part, count, advance=advance) for part in parts]))
    excess, controls = [None] * len(settings), [None] * len(settings)

    def go_on(which: Sequence[int], into: list, changes: Sequence | None = None) -> list[tuple[Changes, Changes]]:
        of = [settings[i] for i in which]
        said, made = continuations(model, shape, prompts, count, of, evict, progress, **known, changes=changes)
        for i, each in zip(which, said, strict=True):
            into[i] = bits_of(each) - own
        return made

    changed = [i for i, setting in enumerate(settings) if setting.strategy.label != EXACT]
    made = dict(zip(changed, go_on(changed, excess), strict=True))
    made = {i: of for i, of in made.items() if has_control(settings[i].strategy) and not all(e.nothing for e in of)}
    go_on(list(made), controls, list(made.values()))
    return FreeRun(prompts.shape[1], count, own, excess, controls)


@torch.inference_mode()
def continuations(
    model,
    shape: MoeShape,
    prompts: torch.Tensor,
    count: int,
    settings: Sequence[Setting],
    evict: Callable,
    progress: Progress,
    calibration: Calibration | None = None,
    miss_cost: float = 0.0,
    leveled: LeveledExperts | None = None,
    level_bytes: LevelBytes = LevelBytes(),  # noqa: B008 (frozen)
    changes: Sequence[tuple[Changes, Changes]] | None = None,
) -> tuple[torch.Tensor, list[tuple[Changes, Changes]]]:
    """What each setting makes of each prompt, all of one strategy's name side by side.

    Args, Raises: as for ``run_freely``, and
        changes: of each setting, in prompts and in decode, what is changed by chance in its place; None: it chooses.

    Returns:
        ``[settings, P, N]`` tokens; and what each setting changed in prompts and in decode.
    """
    rules = routing_rules(moe_layers(model), shape.top_k, "cpu")
    rows = [setting for setting in settings for _ in prompts]
    said, made = prompts.new_empty(len(rows), count), [(Changes(), Changes())] * len(settings)
    for members in batches_of(rows, shape, prompts.shape[1] + count, level_bytes):
        strategies = [rows[i].strategy for i in members]
        name, rule = strategies[0].name, strategies[0].rule
        prompt = torch.tensor([i % len(prompts) for i in members])
        if changes is not None:
            chance = Chance(rules, shape.top_k, strategies, prompt.tolist())
            chance.set(*zip(*(changes[i // len(prompts)] for i in members), strict=True))
            name, route, levels_of, decides = f"as {name}, by chance", chance.route, chance.levels_of, False
        else:
            state = state_of([rows[i] for i in members], shape, level_bytes)
            known = {"calibration": calibration, "miss_cost": miss_cost, "gates_prompts": False}
            chooser = Chooser(rules, shape.top_k, strategies, eviction_of(rule, evict, calibration, shape), **known)
            _draw_apart(chooser, prompt)
            route, levels_of, decides = router_of(chooser, state, len(members)), state.levels_of, rule.decides
        shown = progress(f"decoding freely: {name}, {len(members)} side by side", count)
        with gates_ahead(model, rule, calibration) as gates, shown as advance:
            choose = Ahead(gates, route).route if decides else route
            counted = Counted(choose, levels_of, rules, shape, len(members))
            run = leveled.of(strategies[0], levels_of) if rule.cheaper else None
            said[members] = decode(model, prompts[prompt], count, counted.route, advance, run)
        for i, *of in zip(members, counted.of_prompts, counted.of_decode, strict=True):
            made[i // len(prompts)] = tuple(map(add, made[i // len(prompts)], of))
    return said.view(len(settings), len(prompts), count), made


@torch.inference_mode()
def decode(
    model,
    prompts: torch.Tensor,
    count: int,
    route: RouteLayer | None = None,
    advance: Callable[[], None] = lambda: None,
    experts: RunExperts | None = None,
) -> torch.Tensor:
    """``[B, N]`` the greedy continuations of prompts ``[B, T]``, side by side, through the key-value cache.

    Args:
        count: N.
        route: as for ``Swap``, for S = B * T tokens of the prompts and then S = B; None: the model's own.
        advance: called after each token.
        experts: as for ``Swap``.
    """
    said, tokens, past = [], prompts, None
    with nullcontext() if route is None else Swap(model, route, experts):
        for _ in range(count):
            output = model(tokens, past_key_values=past, use_cache=True)
            tokens, past = output.logits[:, -1:].argmax(-1), output.past_key_values
            said.append(tokens)
            advance()
    return torch.cat(said, 1)


@torch.inference_mode()
def continuation_bits(model, prompts: torch.Tensor, continuations: torch.Tensor) -> torch.Tensor:
    """``[B]`` float64 bits a token of continuations ``[B, N]`` after prompts ``[B, T]``, under the model as it is."""
    whole = torch.cat((prompts, continuations), 1)
    log_p = log_probabilities(model(whole[:, :-1]).logits[:, prompts.shape[1] - 1 :])
    return -log_p.gather(-1, continuations[..., None]).double().mean((1, 2)).cpu() / NATS_PER_BIT


def bootstrap_interval(
    values: torch.Tensor, seed: int, share: float = SHARE, draws: int = DRAWS
) -> tuple[float, float]:
    """Where the mean of what the values are a sample of may lie: the percentile bootstrap (Efron, 1979).

    As many values are drawn, with replacement, again and again: the interval has the middle share of their means. Of
    few values it is too narrow.

    Args:
        values: ``[P]``.
        seed: of the draws: the same gives the same interval.
        share: of the means in the interval.
        draws: how many means.
    """
    drawn = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(seed))
    tails = torch.tensor([(1 - share) / 2, (1 + share) / 2], dtype=torch.float64)
    low, high = values.double()[drawn].mean(1).quantile(tails).tolist()
    return low, high


def _draw_apart(chooser: Chooser, prompt: torch.Tensor) -> None:
    """Let chance draw for each cache's prompt anew: else all prompts would have the luck of one, and not be a sample.

    The first prompt has the draws that it would have in ``load``. An odd stride keeps a layer's seeds apart up to the
    256 that are told apart (``noise_bits`` sees 32 bits, a seed the upper 8).
    """
    if chooser.knobs is not None:
        chooser.knobs[..., KNOBS.index("seed")] += (len(chooser.knobs) | 1) * prompt
