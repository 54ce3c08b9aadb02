"""Make a ``Calibration``: a text through the model, and what each policy has to know of it.

Every part is a pure function of what the text gave: of logits, choices, or the experts' outputs.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import comb

import torch

from cachemoe.kernels.experts_cpu import side_by_side
from cachemoe.kernels.formats import PageFormat
from cachemoe.kernels.policy import KNOBS
from cachemoe.kernels.reference_route import candidates, gate_scores
from cachemoe.kernels.state import Residency
from cachemoe.moe.calibration import PARTS, QUANTILES, Calibration
from cachemoe.moe.cheapening import STEPS, cheap_losses, hobbit_weights, importance
from cachemoe.moe.chooser import Chooser
from cachemoe.moe.clusters import clusters, co_routing, gate_similarity, output_similarity
from cachemoe.moe.layers import moe_layers, recorded_routers, routing_rules
from cachemoe.moe.leveled import LeveledExperts
from cachemoe.moe.policies.naee_prune import ABSENT
from cachemoe.moe.policies.relu_route import most_places
from cachemoe.moe.progress import Progress
from cachemoe.moe.quality import divergence, log_probabilities, rows_at_once
from cachemoe.moe.routers import RoutingRule, own_choice
from cachemoe.moe.shape import MoeShape
from cachemoe.moe.strategies import Strategy
from cachemoe.moe.swap import Swap
from cachemoe.offload.residency import least_recently_used
from cachemoe.offload.simulate import lru_misses

REMOVAL_TOKENS = 256  # that the removal of experts is tried on
LOSS_WINDOWS = 2  # that the loss of rounding is measured on
FIT_TOUCHES = 1024  # of layers by tokens, that an eviction policy is fitted on
GROUPS = 8  # clusters of a layer, as in the paper


@torch.inference_mode()
def calibrate(
    model,
    source,
    formats: Sequence[PageFormat],
    leveled: LeveledExperts,
    windows: torch.Tensor,
    fingerprint: str,
    name: str,
    progress: Progress,
) -> Calibration:
    """See the module.

    Args:
        model: of transformers, in float32, with its own routing.
        source: the ``Checkpoint`` or ``ModelExperts`` that its experts come from.
        formats: of their pages, in which they compute, and of a cheaper level.
        leveled: computes in both.
        windows: ``[windows, context]`` tokens.
        fingerprint, name: of the checkpoint.
        progress: shows what takes long.
    """
    shape: MoeShape = source.shape
    layers, k = moe_layers(model), shape.top_k
    rules = routing_rules(layers, k, "cpu")
    with progress("recording the routers", len(windows)) as advance:
        logits, seen = _recorded(model, layers, windows, advance)
    # Shares of the scores, as policies see them, whatever the model makes of these.
    choices = [own_choice(replace(rule, weigh=None), each, k) for rule, each in zip(rules, logits, strict=True)]
    with progress("forcing each layer to one expert", len(windows) * len(layers)) as advance:
        losses = divergences(model, shape, rules, windows, advance)
    token_ids, place = windows.flatten().cpu().unique(return_inverse=True)
    shares = torch.stack([rest_shares(weights).square().mean() for _, weights in choices])
    removal, important, groups = [], [], []
    count = min(GROUPS, max(shape.experts // 2, 1))
    with progress("removing experts", len(layers)) as advance:
        for layer, rule in enumerate(rules):
            outputs, cheap = (
                torch.cat([_output(source, each, layer, e, seen[layer]) for e in range(shape.experts)])
                for each in formats
            )  # [E, T, H]
            tokens = outputs.shape[1]
            removal.append(removal_order(logits[layer][:tokens], outputs, rule, k))
            ids, weights = choices[layer]
            important.append(importance(outputs, cheap, ids[:tokens], weights[:tokens]))
            alike = gate_similarity(layers[layer].router.weight.cpu()), output_similarity(outputs)
            groups.append(torch.stack([clusters(each, count) for each in (*alike, co_routing(ids, shape.experts))]))
            advance()
    order = torch.cat(important).argsort(stable=True)
    few = windows[:LOSS_WINDOWS]
    with progress("rounding experts", (PARTS + 1) * len(few)) as advance:
        cheap_loss = cheap_losses(model, shape, rules, few, order, leveled, advance)
    some = max(FIT_TOUCHES // len(layers), 1)
    sizes = [each.page_bytes for each in formats]
    with progress("fitting an eviction policy", comb(STEPS + 3, 3)) as advance:
        fitted = hobbit_weights([each[:some] for each in logits], rules, shape, sizes, advance)
    return Calibration(
        ratios=torch.stack([ratios(weights) for _, weights in choices]),
        thresholds=torch.stack([threshold(rule, each, k) for rule, each in zip(rules, logits, strict=True)]),
        sensitivities=torch.where(shares > 0, losses / shares, 0.0),
        removal=torch.stack(removal).short(),
        misses=torch.stack([lru_misses(ids, shape.experts) / len(ids) for ids, _ in choices]),
        token_ids=token_ids.int(),
        by_token=torch.stack([means(each, place) for each in logits]).half(),
        clusters=torch.stack(groups, 1).short(),
        importance=torch.stack(important),
        cheap_losses=cheap_loss,
        hobbit=fitted,
        model=fingerprint,
        name=name,
        k=k,
        tokens=windows.numel(),
        cheaper=formats[1].kind,
    )


def _recorded(model, layers, windows, advance) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of each layer the logits ``[T, E]``, float32, and of the first tokens what the experts saw, ``[T, H]``."""
    logits, seen = [[] for _ in layers], [[] for _ in layers]

    def keep(kept):
        def hook(experts, arguments):
            if sum(map(len, kept)) < REMOVAL_TOKENS:
                hidden = arguments[0]
                kept.append(hidden.reshape(-1, hidden.shape[-1]).float().cpu())

        return hook

    with ExitStack() as stack:
        for layer, kept in zip(layers, seen, strict=True):
            stack.callback(layer.experts.register_forward_pre_hook(keep(kept)).remove)
        for window in windows:
            with recorded_routers(model) as answers:
                model(window[None].to(model.device))
            for kept, (answer,) in zip(logits, answers, strict=True):
                kept.append(answer.logits.float().cpu())
            advance()
    return [torch.cat(each) for each in logits], [torch.cat(each)[:REMOVAL_TOKENS] for each in seen]


def ratios(weights: torch.Tensor) -> torch.Tensor:
    """``[QUANTILES]`` of a chosen expert's weight over the best one's, from weights ``[T, K]``; zeros where K is 1."""
    each = (weights[:, 1:] / weights[:, :1]).flatten().sort().values
    if not len(each):
        return torch.zeros(QUANTILES)
    places = torch.linspace(0, len(each) - 1, QUANTILES, dtype=torch.float64)
    low = places.long()
    high = (low + 1).clamp(max=len(each) - 1)
    return torch.lerp(each[low], each[high], (places - low).float())


def threshold(rule: RoutingRule, logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """The selection value above which, for logits ``[T, E]``, tokens have K experts on average; at least one each."""
    gates = gate_scores(logits, rule.scores)
    values = logits if rule.correction is None else gates + rule.correction
    allowed = candidates(values, gates if rule.correction is None else values, rule.scores)
    places = most_places(None, top_k, logits.shape[1])
    # The best of a token counts in any case; of the others as many as make K - 1 on average.
    others = values.masked_fill(~allowed, -torch.inf).topk(places).values[:, 1:].flatten().sort(descending=True).values
    wanted = len(logits) * (top_k - 1)
    if wanted == 0:
        return values.max()
    return torch.nextafter(others[wanted - 1], torch.tensor(-torch.inf))  # the last that counts lies just above


def means(logits: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """``[U + 1, E]`` the mean of logits ``[T, E]`` for each of U places ``[T]``, and of all of them."""
    count = torch.bincount(place)
    sums = torch.zeros(len(count), logits.shape[1]).index_add_(0, place, logits)
    return torch.cat((sums / count[:, None], logits.mean(0, keepdim=True)))


def rest_shares(weights: torch.Tensor) -> torch.Tensor:
    """``[T]`` the share of all but the best, from weights ``[T, K]``."""
    return 1 - weights[:, 0] / weights.sum(1)


def divergences(
    model, shape: MoeShape, rules: Sequence[RoutingRule], windows: torch.Tensor, advance: Callable[[], None]
) -> torch.Tensor:
    """``[L]`` nats a token between the model and itself with one layer at a time running the best expert alone."""
    count, k = len(rules), shape.top_k
    if k == 1:
        return torch.zeros(count)
    at_once = min(count, rows_at_once(windows.shape[1], shape.vocabulary))
    total = torch.zeros(count, dtype=torch.float64)
    for window in windows:
        reference = log_probabilities(model(window[None].to(model.device)).logits[0])
        for first in range(0, count, at_once):
            rows = range(first, min(first + at_once, count))
            chooser = Chooser(rules, k, [Strategy("random-drop", 0.0)] * len(rows), least_recently_used)
            for row, layer in enumerate(rows):
                chooser.knobs[layer, row, KNOBS.index("a")] = 1.0  # in this layer all but the best are dropped
            everyone = Residency.empty(torch.full((len(rows),), shape.experts), shape.experts)

            def route(layer, logits, hidden, chooser=chooser, state=everyone, rows=rows):
                return chooser.route(layer, logits.unflatten(0, (len(rows), -1)).cpu(), state.clone())

            with Swap(model, route):
                log_p = log_probabilities(model(window.expand(len(rows), -1).to(model.device)).logits)
            total[list(rows)] += divergence(reference, log_p).double().sum((1, 2)).cpu()
            for _ in rows:
                advance()
    return (total / windows.numel()).float()


def _output(source, page_format: PageFormat, layer: int, e: int, x: torch.Tensor) -> torch.Tensor:
    """``[1, T, H]`` of one expert, as the pool's page of it computes."""
    page = page_format.pack(**source.expert(layer, e))
    return side_by_side(x.contiguous(), page_format.views(page[None]), torch.tensor([0]), page_format)


def removal_order(logits: torch.Tensor, outputs: torch.Tensor, rule: RoutingRule, top_k: int) -> torch.Tensor:
    """``[E]`` experts in the order of removal: each time the one without which the layer's output changes least.

    The last K are in the order of their ids: a model cannot do with fewer.

    Args:
        logits: ``[T, E]``.
        outputs: ``[E, T, H]`` float32, of every expert for every token.
        rule: the model's.
        top_k: K.
    """
    experts = logits.shape[1]
    ids, weights = own_choice(rule, logits, top_k)
    whole = current = _mixture(ids, weights, outputs)
    removed: list[int] = []
    while experts - len(removed) > top_k:
        trials = {}
        for e in range(experts):
            if e not in removed:
                new_ids, new_weights = _without(rule, logits, [*removed, e], top_k)
                # Where the same experts are left, their weights have grown alike, and so has the sum.
                output = current * (new_weights[:, :1] / weights[:, :1])
                others = (new_ids != ids).any(1) if rule.weigh is None else torch.ones(len(ids), dtype=torch.bool)
                output[others] = _mixture(new_ids[others], new_weights[others], outputs[:, others])
                trials[e] = float((output - whole).square().sum())
        removed.append(min(trials, key=trials.__getitem__))
        ids, weights = _without(rule, logits, removed, top_k)
        current = _mixture(ids, weights, outputs)
    return torch.tensor(removed + [e for e in range(experts) if e not in removed])


def _without(rule: RoutingRule, logits: torch.Tensor, removed: list[int], top_k: int):
    """The model's choice among the experts that are left."""
    offset = torch.zeros(logits.shape[1])
    offset[removed] = ABSENT
    if rule.correction is not None:
        return own_choice(replace(rule, correction=rule.correction + offset), logits, top_k)
    return own_choice(rule, logits + offset, top_k)


def _mixture(ids, weights, outputs):
    """``[T, H]`` from ids and weights ``[T, K]`` and each expert's output ``[E, T, H]``."""
    return (weights[..., None] * outputs[ids, torch.arange(len(ids))[:, None]]).sum(1)
