"""What a routing strategy costs in quality: one batched forward a window, caches stepping token by token inside it.

With a cache for each layer, a layer's residency depends only on that layer's own past, so the batched forward routes
exactly as token-by-token decode would. All settings ride in one batch, each with its own caches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from cachemoe.kernels.state import Residency
from cachemoe.moe.calibration import Calibration
from cachemoe.moe.chance import Chance, Changes, Counted, has_control
from cachemoe.moe.chooser import Chooser
from cachemoe.moe.layers import moe_layers, recorded_routers, routing_rules
from cachemoe.moe.leveled import LeveledExperts
from cachemoe.moe.policies.rule import Rule
from cachemoe.moe.routers import RoutingRule
from cachemoe.moe.shape import MoeShape
from cachemoe.moe.sizes import LevelBytes, split_pool
from cachemoe.moe.sources import Ahead, Forecast, Gate, gates_ahead
from cachemoe.moe.strategies import Strategy
from cachemoe.moe.swap import RouteLayer, RunExperts, Swap
from cachemoe.offload.residency import least_recently_used
from cachemoe.offload.simulate import belady_misses

STEPPED = 4  # what has to be stepped token by token, twenty times as slow, has one window of so many
MOST_BYTES = 1 << 30  # of a batch's logits in float32
NATS_PER_BIT = 0.6931471805599453
BLOCK = 64  # tokens
OF_CONTROLS = ("kl_nats", "perplexity_change", "top1_agreement", "k_eff", "experts_swapped", "experts_cheap")


@dataclass(frozen=True)
class Setting:
    """One row of a table: a strategy at a capacity, slots of each layer, if all were for full precision."""

    strategy: Strategy
    capacity: int


@dataclass
class Quality:
    """Sums over the text for one setting; compared with the unmodified model token by token.

    Args:
        state: the caches after the text, ``[L]``.
        nats: ``[windows]`` negative log-likelihood of the scored tokens.
        divergences: ``[windows]`` of ``[T - 1]`` float64, each scored token's divergence, in nats.
        missed: ``[windows]`` pages that token-by-token decode would have fetched, and those at a cheaper level of them.
        changes: what was done to the model's own selections, dropped ones among them.
        tokens: scored tokens; a window's first token is not predicted.
        top_k: K of the model.
        layers: L of the model.
        control: the same text with as much changed by chance; None where nothing was.
    """

    state: Residency | None
    nats: list[float] = field(default_factory=list)
    divergences: list[torch.Tensor] = field(default_factory=list)
    missed: list[tuple[int, int]] = field(default_factory=list)
    changes: Changes = field(default_factory=Changes)
    tokens: int = 0
    agreements: int = 0
    top_k: int = 0
    layers: int = 0
    control: "Quality | None" = None

    @property
    def misses(self) -> int:
        return sum(all_levels for all_levels, _ in self.missed)

    @property
    def cheap_misses(self) -> int:
        return sum(cheap for _, cheap in self.missed)

    @property
    def kl(self) -> float:
        """The divergence of all scored tokens, in nats."""
        return float(sum(each.sum() for each in self.divergences))

    @property
    def nats_per_token(self) -> float:
        return sum(self.nats) / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats_per_token / NATS_PER_BIT

    @property
    def perplexity(self) -> float:
        return _exp(self.nats_per_token)

    def perplexity_change(self, unmodified: "Quality") -> float:
        """As a share of the unmodified model's on the same tokens; of logarithms, finite where perplexities are not."""
        same = sum(unmodified.nats[: len(self.nats)]) / self.tokens  # of a shorter text, where this was stepped on one
        return _exp(self.nats_per_token - same) - 1

    @property
    def miss_rate(self) -> float:
        """Misses a selection of the model's own: strategies that select fewer are held to the same measure."""
        return self.misses / max(self.changes.selections, 1)

    def costs(self, unmodified: "Quality") -> dict[str, float]:
        """What reports say of it."""
        changes, selections = self.changes, max(self.changes.selections, 1)
        return {
            "miss_rate": self.miss_rate,
            "perplexity": self.perplexity,
            "perplexity_change": self.perplexity_change(unmodified),
            "kl_nats": self.kl / self.tokens,
            "top1_agreement": self.agreements / self.tokens,
            "k_eff": self.top_k * changes.runs / selections,
            "experts_swapped": changes.swaps / selections,
            "experts_cheap": (changes.cheap + changes.cheap_best) / selections,
            "miss_rate_cheap": self.cheap_misses / selections,
            "scored_tokens": self.tokens,
            "control": self.control and self._against(self.control, unmodified),
        }

    def _against(self, control: "Quality", unmodified: "Quality") -> dict[str, float]:
        """What the control costs, and by how much more the policy diverges; below 0, it is better than chance."""
        more = [a - b for a, b in zip(self.divergences, control.divergences, strict=True)]  # the text being the same
        # Neighbouring tokens see the same context: the error is of the means of blocks of them.
        means = torch.stack([block.mean() for window in more for block in window.split(BLOCK)])
        error = float(means.std() / len(means) ** 0.5) if len(means) > 1 else None
        costs = {name: figure for name, figure in control.costs(unmodified).items() if name in OF_CONTROLS}
        return costs | {"kl_difference": float(torch.cat(more).mean()), "kl_difference_standard_error": error}


@dataclass(frozen=True)
class Evaluation:
    """Qualities of the settings, in their order; of the unmodified model; and its own selections.

    Args:
        original_ids: ``[L, T, K]`` what the unmodified model selected, for Belady.
    """

    settings: list[Quality]
    unmodified: Quality
    original_ids: torch.Tensor

    def belady_miss_rate(self, capacity: int) -> float:
        """Misses a selection of the unmodified model, by the eviction that knows the future."""
        return sum(belady_misses(ids, capacity) for ids in self.original_ids) / self.original_ids.numel()


@torch.inference_mode()
def evaluate(
    model,
    shape: MoeShape,
    windows: torch.Tensor,
    settings: Sequence[Setting],
    evict: Callable,
    progress: Callable[[], None] = lambda: None,
    calibration: Calibration | None = None,
    miss_cost: float = 0.0,
    controls: bool = False,
    leveled: LeveledExperts | None = None,
    level_bytes: LevelBytes = LevelBytes(),  # noqa: B008 (frozen)
) -> Evaluation:
    """Run the text through the unmodified model and through every setting.

    Settings whose layers share a cache go token by token, on the first quarter of the windows (1 / ``STEPPED``).

    Args:
        model: the transformers model.
        windows: ``[windows, context]`` tokens; attention starts afresh in each window, the caches live on.
        settings: strategies and capacities.
        evict: eviction policy.
        progress: called after each window.
        calibration, miss_cost: as for ``Chooser``.
        controls: whether windows in which a setting drops, swaps or cheapens experts are run once more, with as many of
            them by chance.
        leveled: computes for settings that have cheaper levels.
        level_bytes: of each level.

    Raises:
        InputError: if a strategy needs a calibration or more slots than it has.
    """
    for setting in settings:
        setting.strategy.check_slots(setting.capacity, shape.experts, shape.top_k)
    rules, layers = routing_rules(moe_layers(model), shape.top_k, "cpu"), len(shape.layers)
    unmodified = Quality(None)
    qualities: list[Quality | None] = [None] * len(settings)
    batches = []
    for members in batches_of(settings, shape, windows.shape[1], level_bytes):
        state = state_of([settings[i] for i in members], shape, level_bytes)
        strategies = [settings[i].strategy for i in members]
        leaves = eviction_of(strategies[0].rule, evict, calibration, shape)
        chooser = Chooser(rules, shape.top_k, strategies, leaves, calibration=calibration, miss_cost=miss_cost)
        for row, i in enumerate(members):
            strategy = settings[i].strategy
            about = {"top_k": shape.top_k, "layers": layers}
            control = Quality(None, **about) if controls and has_control(strategy) else None
            qualities[i] = Quality(state if strategy.rule.shared else state[:, row], **about, control=control)
        chance = Chance(rules, shape.top_k, strategies, [0] * len(members))
        batches.append(([qualities[i] for i in members], state, chooser, chance, strategies[0]))

    original_ids = []
    for number, window in enumerate(windows):
        with recorded_routers(model) as answers:
            reference = log_probabilities(model(window[None]).logits[0, :-1])
        original_ids.append(torch.stack([answer.ids.cpu() for (answer,) in answers]))
        _score(unmodified, reference, reference, window[1:])
        for rows, state, chooser, chance, strategy in batches:
            rule = strategy.rule
            if rule.shared and STEPPED * number >= len(windows):
                continue
            with gates_ahead(model, rule, calibration) as gates:
                forecast = forecast_of(strategy, gates, rules, state, shape)
                route = router_of(chooser, state, len(rows), forecast)
                route = Ahead(gates, route).route if rule.decides else route
                counted = Counted(route, state.levels_of, rules, shape, len(rows))
                experts = leveled.of(strategy, state.levels_of) if rule.cheaper else None
                forward = _token_by_token if rule.shared else _at_once
                log_p = _run(model, window, len(rows), counted, experts, forward)
            _add(rows, log_p, reference, window, counted)
            by_chance = [quality.control for quality in rows]
            if any(by_chance):
                chance.set(counted.changes, counted.changes)
                counted = Counted(chance.route, chance.levels_of, rules, shape, len(rows))
                experts = leveled.of(strategy, chance.levels_of) if rule.cheaper else None
                log_p = _run(model, window, len(rows), counted, experts, _at_once)
                _add(by_chance, log_p, reference, window, counted)
        progress()
    for quality in qualities:
        if quality.changes.nothing:
            quality.control = None
    return Evaluation(qualities, unmodified, torch.cat(original_ids, 1))


def router_of(chooser: Chooser, state: Residency, rows: int, forecast: Forecast | None = None) -> RouteLayer:
    """A route for ``Swap`` of so many sequences side by side, each with caches of its own."""
    caches = _caches_of(state)

    def route(layer, logits, _=None):
        if forecast is not None:
            forecast.note(layer, logits, state)
        return chooser.route(layer, logits.unflatten(0, (rows, -1)).cpu(), caches[layer])

    return route


def _caches_of(state: Residency) -> list[Residency]:
    """What each layer's routing sees, made once: each keeps what it derives from its tensors."""
    return [state.of_layer(layer) if state.shared else state[layer] for layer in range(len(state.tokens))]


def forecast_of(
    strategy: Strategy, gates: Sequence[Gate], rules: Sequence[RoutingRule], state: Residency, shape: MoeShape
) -> Forecast | None:
    """What tells the caches which experts are expected, if the strategy has them told."""
    if not strategy.rule.forecasts:
        return None
    own, caches = Chooser(rules, shape.top_k, [Strategy("original")], least_recently_used), _caches_of(state)

    def expected(layer, logits):
        return own.peek(layer, logits.cpu(), caches[layer])

    return Forecast(gates, expected, int(strategy.value))


def eviction_of(rule: Rule, evict: Callable, calibration: Calibration | None, shape: MoeShape) -> Callable:
    """The rule's own eviction policy, or the one given."""
    return evict if rule.evict is None else rule.evict(calibration, len(shape.layers), shape.top_k)


def state_of(settings: Sequence[Setting], shape: MoeShape, level_bytes: LevelBytes) -> Residency:
    """Cold caches of settings that go through the model together: ``[L, B]``, or ``[B]`` that all layers share."""
    rule, layers = settings[0].strategy.rule, len(shape.layers)
    splits = [_split(setting, shape, level_bytes) for setting in settings]
    if rule.shared:
        return Residency.empty(torch.tensor([full[0] for full, _ in splits]), shape.experts, splits[0][1], layers)
    capacity = torch.tensor([full[0] for full, _ in splits]).expand(layers, -1)
    if not rule.resident:
        return Residency.empty(capacity, shape.experts, splits[0][1])
    state, everyone = Residency.empty(capacity, shape.experts, [shape.experts]), torch.arange(shape.experts)
    state.slot_of[..., shape.experts :], state.page_of[..., : shape.experts] = everyone, shape.experts + everyone
    return state


def _split(setting: Setting, shape: MoeShape, level_bytes: LevelBytes) -> tuple[list[int], list[int]]:
    places = setting.strategy.places(shape.experts, shape.top_k)
    return split_pool([setting.capacity] * len(shape.layers), setting.strategy, level_bytes, shape.experts, places)


def _run(model, window, rows, counted: Counted, experts: RunExperts | None, forward: Callable) -> torch.Tensor:
    """``[rows, T - 1, V]`` log-probabilities of a window's tokens but the first."""
    with Swap(model, counted.route, experts):
        return log_probabilities(forward(model, window, rows)[:, :-1])


def _add(rows: Sequence[Quality | None], log_p, reference, window, counted: Counted) -> None:
    """Add a window to each row that is wanted."""
    for quality, row, changes, missed in zip(rows, log_p, counted.changes, counted.missed, strict=True):
        if quality is not None:
            _score(quality, row, reference, window[1:])
            quality.changes += changes
            quality.missed.append(missed)


def _at_once(model, window: torch.Tensor, rows: int) -> torch.Tensor:
    """``[rows, T, V]`` logits."""
    return model(window.expand(rows, -1)).logits


def _token_by_token(model, window: torch.Tensor, rows: int) -> torch.Tensor:
    """The same, each token after the one before has gone through all layers."""
    past, logits = None, []
    for token in window:
        answer = model(token.expand(rows, 1), past_key_values=past, use_cache=True)
        past = answer.past_key_values
        logits.append(answer.logits)
    return torch.cat(logits, 1)


def rows_at_once(tokens: int, vocabulary: int) -> int:
    """How many sequences of so many tokens go through a model together: as many as their output leaves room for."""
    return max(1, MOST_BYTES // (4 * tokens * vocabulary))


def batches_of(
    settings: Sequence[Setting],
    shape: MoeShape,
    context: int,
    level_bytes: LevelBytes = LevelBytes(),  # noqa: B008
) -> Iterator[list[int]]:
    """The settings that go through the model together: of one name and as many places, with the same slots for cheaper
    levels, as many as their output leaves room for."""
    most = rows_at_once(context, shape.vocabulary)

    def kind(setting):
        alone = setting if setting.strategy.rule.shared or setting.strategy.rule.resident else None
        _, cheaper = _split(setting, shape, level_bytes)
        return setting.strategy.name, setting.strategy.places(shape.experts, shape.top_k), *cheaper, alone

    for each in dict.fromkeys(map(kind, settings)):
        members = [i for i, setting in enumerate(settings) if kind(setting) == each]
        yield from (members[start : start + most] for start in range(0, len(members), most))


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Of logits ``[..., V]``, in float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def divergence(reference: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """``[..., V]`` each token's part of the divergence of log-probabilities from a reference's, in nats."""
    p = reference.exp()
    # A token that cannot be has no part in it, though its logarithms are infinite.
    return torch.where(p == 0, 0.0, p * (reference - log_p))


def _score(quality: Quality, log_p: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> None:
    """Add one window: ``[T, V]`` log-probabilities against the unmodified model's."""
    quality.nats.append(float(-log_p.gather(-1, targets[:, None]).double().sum()))
    quality.tokens += len(targets)
    quality.divergences.append(divergence(reference, log_p).double().sum(-1))
    quality.agreements += int((reference.argmax(-1) == log_p.argmax(-1)).sum())


def _exp(value: float) -> float:
    """inf where a float does not hold it, and no exception."""
    return float(torch.tensor(value, dtype=torch.float64).exp())
