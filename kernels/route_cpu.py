"""``route`` on the CPU: numpy over the tensors' memory, since for one token torch's overhead exceeds the work.

What does not depend on residency is computed for all tokens at once. Then the tokens are stepped: several caches side
by side; a single one, as in decode, with Python's own numbers.
"""

from collections.abc import Callable

import numpy as np
import torch

from cachemoe.kernels import reference_route
from cachemoe.kernels.policy import ORIGINAL, Policy
from cachemoe.kernels.state import SOFTMAX, GateScores, Misses, Routing

LARGE = 1e38  # the difference of smaller numbers is finite in float32
NEVER, FIRST = np.iinfo(np.int64).max, np.iinfo(np.int64).min


def route_cpu(
    logits: torch.Tensor,
    state,
    evict: Callable,
    top_k: int,
    policy: Policy,
    scores: GateScores,
    correction: torch.Tensor | None,
    out: Routing | None,
) -> Routing:
    """As :func:`cachemoe.kernels.reference_route.route`; the tensors of ``state`` and ``out`` are contiguous."""
    if (least := min(state.capacity.tolist())) < top_k:
        raise ValueError(f"{least} slots cannot hold the {top_k} experts of one token")
    caches, tokens, experts = logits.shape
    ranked = _rank(logits, scores, correction)
    if ranked is None:
        routing = reference_route.route(logits, state, evict, top_k, policy, scores, correction)
        if out is None:
            return routing
        for tensor, result in zip(out.tensors(), routing.tensors(), strict=True):
            tensor.copy_(result)
        return out

    negated, order, places, gates, ranges = ranked
    choose = _chooser(negated, order, places, gates, _mean_range(ranges, state), policy, scores, top_k)
    step = _step_one if caches == 1 else _step
    ids, slots, hits, *misses = step(choose, state, evict, tokens, top_k)

    weights = gates.take(_places(ids, experts))
    if scores.renormalise:
        weights /= weights.sum(-1, keepdims=True) + np.float32(scores.epsilon)
    if scores.scale != 1:
        weights *= np.float32(scores.scale)
    results = (ids, weights, slots, hits, *misses)
    if out is None:
        *tensors, miss_experts, miss_slots, miss_count = map(torch.from_numpy, results)
        return Routing(*tensors, Misses(miss_experts, miss_slots, miss_count))
    for tensor, result in zip(out.tensors(), results, strict=True):
        tensor.numpy()[...] = result
    return out


def place(ids: torch.Tensor, weights: torch.Tensor, state, evict: Callable) -> Routing:
    """As :func:`cachemoe.kernels.reference_route.place`; the tensors of ``state`` are contiguous."""
    caches, tokens, k = ids.shape
    if (least := min(state.capacity.tolist())) < k:
        raise ValueError(f"{least} slots cannot hold the {k} experts of one token")
    weights = weights.detach().float().numpy()
    order = (-weights).argsort(-1, kind="stable")
    chosen = np.take_along_axis(ids.numpy(), order, -1)
    step = _step_one if caches == 1 else _step
    ids, slots, hits, *misses = step(lambda at, _: chosen[at], state, evict, tokens, k)
    results = ids, np.take_along_axis(weights, order, -1), slots, hits
    return Routing(*map(torch.from_numpy, results), Misses(*map(torch.from_numpy, misses)))


def peek(
    logits: torch.Tensor,
    state,
    top_k: int,
    policy: Policy = ORIGINAL,
    scores: GateScores = SOFTMAX,
    correction: torch.Tensor | None = None,
) -> list[int]:
    """What ``route`` would choose for one token, with nothing updated: a prediction for a layer that is still to come.

    Args:
        logits: ``[E]``.
        state: of one cache (B = 1).
        top_k, policy, scores, correction: as for ``route``.

    Returns:
        K experts, the highest selection value first.
    """
    needs_gates = correction is not None or scores.groups > 1 or "before" in policy.words
    ranked = _rank(logits[None, None], scores, correction, needs_gates)
    if ranked is None:
        anyone = (lambda last_use, uses: last_use), top_k
        routing = reference_route.route(logits[None, None], state.clone(), *anyone, policy, scores, correction)
        return routing.ids.flatten().tolist()
    negated, order, places, gates, _ = ranked
    mean_range = [[state.range_sum.item() / max(state.tokens.item(), 1)]]
    choose = _chooser(negated, order, places, gates, mean_range, policy, scores, top_k)
    return choose((0, 0), state.slot_of.numpy()[0]).tolist()


def _rank(logits, scores, correction, needs_gates=True):
    """What does not depend on residency: selection values, negated, ``[B, T, E]``; experts in order of them, and where
    these stand in a flat array; gate scores if needed; the values' ranges ``[B, T]``. None where a value is not finite,
    as only a router gone astray has it: numpy would sort NaN last."""
    if logits.requires_grad:
        logits = logits.detach()
    logits = logits.float()
    gates = reference_route.gate_scores(logits, scores) if needs_gates else logits
    corrected = gates if correction is None else gates + correction.float().reshape(-1, 1, logits.shape[2])
    negated = -(logits if correction is None else corrected).numpy()
    order = negated.argsort(-1, kind="stable")
    experts = order.shape[2]
    places = _places(order, experts)
    ends = negated.take(places[..., :: max(experts - 1, 1)])  # the highest and the lowest, or the only one
    if not all(-LARGE < value < LARGE for value in ends.ravel().tolist()):
        return None
    if scores.top_groups < scores.groups:
        candidates = reference_route.candidates(torch.from_numpy(-negated), corrected, scores).numpy()
        negated = np.where(candidates, negated, np.float32(np.inf))
        order = negated.argsort(-1, kind="stable")
        places = _places(order, experts)
    return negated, order, places, gates.numpy(), ends[..., -1] - ends[..., 0]


def _places(ids, experts):
    """Where experts ``[B, T, ...]`` stand in a flat array of ``[B, T, E]``."""
    caches, tokens, _ = ids.shape
    if caches == tokens == 1:
        return ids
    return ids + np.arange(0, caches * tokens * experts, experts).reshape(caches, tokens, 1)


def _mean_range(ranges, state):
    """``[B, T]`` float64: the mean range over the tokens before each. Adds ``ranges`` ``[B, T]`` to the state.

    Summed in order in float64, so that a sequence cut anywhere gives the same bits.
    """
    seen, range_sum = state.tokens.numpy(), state.range_sum.numpy()
    if len(ranges) == 1:
        means, past, total = [], seen.item(), range_sum.item()
        for added in ranges[0].tolist():
            means.append(total / max(past, 1))
            past, total = past + 1, total + added
        seen[0], range_sum[0] = past, total
        return [means]
    tokens = ranges.shape[1]
    past = np.maximum(seen[:, None] + np.arange(tokens), 1)
    sums = np.concatenate((range_sum[:, None], ranges), 1).cumsum(1)
    range_sum[:] = sums[:, -1]
    seen += tokens
    return sums[:, :-1] / past


def _chooser(negated, order, places, gates, mean_range, policy, scores, k):
    """The policy as a function: from a token's index into ``[B, T, E]``, of one cache or of all, and ``slot_of``
    ``[..., E]`` to the chosen experts ``[..., K]``, the highest selection value first."""
    if policy.key is None:
        return lambda at, slot_of: order[at][..., :k]
    words = policy.words
    rank = np.empty(order.shape, np.int64)
    rank.put(places, np.arange(order.shape[2]))
    seen = {}
    if "value" in words:
        seen["value"] = -negated
    if "rank" in words:
        seen["rank"] = rank.astype(np.float32)
    if "before" in words:
        seen["before"] = _before(gates, places, scores)
    if "span" in words:
        seen["span"] = np.array(mean_range, np.float32)[..., None]
    knobs = policy.knobs.numpy()
    if len(order) == 1:
        j, known = min(int(knobs[0, 0]), k), {"a": knobs[0, 1]}
        kept = order[..., :j]
    else:
        known = {"a": knobs[:, 1:]}
        kept = rank < np.minimum(knobs[:, None, :1], k)
    closed = None if scores.top_groups == scores.groups else np.isinf(negated)  # groups not to choose from

    def choose(at, slot_of):
        for word in seen:
            known[word] = seen[word][at]
        known["have"] = (slot_of >= 0).view(np.int8)
        smallest = -policy.key(*[known[word] for word in words])
        if smallest.dtype != np.float32:
            smallest = smallest.astype(np.float32)
        if closed is not None:
            smallest[closed[at]] = np.inf
        smallest[kept[at]] = -np.inf
        ranks = _take(rank[at], smallest.argsort(-1, kind="stable")[..., :k])
        ranks.sort(-1)
        return _take(order[at], ranks)

    return choose


def _take(values, positions):
    """Along the last dimension, for one cache or several."""
    return values.take(positions) if values.ndim == 1 else values[np.arange(len(values))[:, None], positions]


def _before(gates, places, scores):
    """``[B, T, E]``: of each expert the share of the scores that the better-ranked have."""
    if scores.function != "softmax":
        gates = gates / np.maximum(gates.sum(-1, keepdims=True), np.finfo(np.float32).tiny)
    # As torch sums: in float64, each partial sum rounded.
    upto, before = gates.take(places).cumsum(-1, np.float64), np.zeros(gates.shape, np.float32)
    before.put(places[..., 1:], upto[..., :-1])
    return before


def _step_one(choose, state, evict, tokens, k):
    """Step one cache: choose, touch and place each token's experts.

    Returns:
        The arrays of a ``Routing`` in order, but for the weights.
    """
    slot_of, expert_of = state.slot_of.numpy()[0], state.expert_of.numpy()[0]
    last_use, uses, clocks = state.last_use.numpy()[0], state.uses.numpy()[0], state.clock.numpy()
    capacity, clock = state.capacity.item(), clocks.item()
    ids, slots = np.empty((1, tokens, k), np.int64), np.empty((1, tokens, k), np.int64)
    hits, missed, taken = [], [], []
    for t in range(tokens):
        ids[0, t] = chosen = choose((0, t), slot_of)
        placed = slot_of.take(chosen).tolist()
        last_use[chosen] = np.arange(clock + k, clock, -1)
        uses[chosen] += 1
        hits.append([slot >= 0 for slot in placed])
        if min(placed) < 0:
            occupants = expert_of[:capacity]
            keys = evict(last_use, uses).take(occupants)
            if occupants[occupants.argmin()] < 0:
                free = (occupants < 0).nonzero()[0]
                keys[free] = FIRST + free
            for slot in placed:
                if slot >= 0:
                    keys[slot] = NEVER
            for i, expert in enumerate(chosen.tolist()):
                if placed[i] < 0:
                    placed[i] = slot = int(keys.argmin())
                    keys[slot] = NEVER
                    old = expert_of.item(slot)
                    if old >= 0:
                        slot_of[old] = -1
                    slot_of[expert], expert_of[slot] = slot, expert
                    missed.append(expert)
                    taken.append(slot)
        slots[0, t] = placed
        clock += k
    clocks[0] = clock
    count, nothing = len(missed), [-1] * (tokens * k - len(missed))
    misses = np.array([missed + nothing]), np.array([taken + nothing]), np.array([count])
    return ids, slots, np.array([hits]), *misses


def _step(choose, state, evict, tokens, k):
    """As ``_step_one`` for B caches."""
    slot_of, last_use, uses = state.slot_of.numpy(), state.last_use.numpy(), state.uses.numpy()
    caches = len(slot_of)
    first = np.arange(0, slot_of.size, slot_of.shape[1])[:, None]  # of each cache in the flat arrays
    clock, flat_slot_of, flat_last_use, flat_uses = (
        state.clock.numpy(),
        *(a.reshape(-1) for a in (slot_of, last_use, uses)),
    )
    ids, slots = np.empty((2, caches, tokens, k), np.int64)
    hits = np.empty(ids.shape, np.bool_)
    misses = (*np.full((2, caches, tokens * k), -1), np.zeros(caches, np.int64))
    touches = np.arange(k, 0, -1)
    for t in range(tokens):
        chosen = choose((slice(None), t), slot_of)
        entries = chosen + first
        placed = flat_slot_of[entries]
        ids[:, t], hits[:, t] = chosen, placed >= 0
        before = clock.copy()
        flat_last_use[entries] = before[:, None] + touches
        flat_uses[entries] += 1
        clock += k
        if not hits[:, t].all():
            _place(chosen, placed, before, first, state, evict, misses)
        slots[:, t] = placed
    return ids, slots, hits, *misses


def _place(chosen, placed, untouched, first, state, evict, misses):
    """Give absent experts the slots of those that leave.

    Args:
        chosen, placed: ``[B, K]`` experts and their slots, -1 where absent; filled in.
        untouched: ``[B]`` the clock before the token.
        first: ``[B, 1]`` where each cache begins in a flat array.
    """
    expert_of, slot_of, last_use = state.expert_of.numpy(), state.slot_of.numpy(), state.last_use.numpy()
    occupants = np.maximum(expert_of, 0) + first
    key = evict(last_use, state.uses.numpy()).take(occupants)
    key[last_use.take(occupants) > untouched[:, None]] = NEVER
    slot = np.arange(expert_of.shape[1])
    free = expert_of < 0
    if free.any():
        key = np.where(free, FIRST + slot, key)
    key[slot >= state.capacity.numpy()[:, None]] = NEVER
    victims = key.argsort(-1, kind="stable")

    experts, places, count = misses
    nth = [0] * len(chosen)
    for b, k in np.argwhere(placed < 0).tolist():
        expert, slot = chosen[b, k], victims[b, nth[b]]
        old = expert_of[b, slot]
        if old >= 0:
            slot_of[b, old] = -1
        slot_of[b, expert] = slot
        expert_of[b, slot] = expert
        placed[b, k] = slot
        experts[b, count[b]] = expert
        places[b, count[b]] = slot
        count[b] += 1
        nth[b] += 1
