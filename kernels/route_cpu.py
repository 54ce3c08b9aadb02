"""``route`` on the CPU: numpy over the tensors' memory, since for one token torch's overhead exceeds the work.

What does not depend on residency is computed for all tokens at once. Then the tokens are stepped: several caches side
by side; a single one, as in decode, with Python's own numbers.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from cachemoe.kernels import reference_route
from cachemoe.kernels.policy import KNOBS, ORIGINAL, Policy, noise_bits
from cachemoe.kernels.state import SOFTMAX, GateScores, Misses, Routing

LARGE = 1e38  # the difference of smaller numbers is finite in float32
NEVER, FIRST = np.iinfo(np.int64).max, np.iinfo(np.int64).min
TINY, SCALE = np.finfo(np.float32).tiny, np.float32(2.0**-24)
PLACES = np.arange(512, dtype=np.float32)
INT8 = np.dtype(np.int8)


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

    first = state.tokens.tolist() if policy.draws else None
    *ranked, ranges = ranked
    choose, keep = _chooser(*ranked, first, _mean_range(ranges, state), policy, scores, top_k)
    step = _step_one if caches == 1 else _step
    ids, slots, hits, *misses = step(choose, keep, state, evict, tokens, top_k)

    weights = ranked[-1].take(_places(ids, experts))
    if keep is not None:
        weights[slots < 0] = 0.0
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


def place(
    ids: torch.Tensor, weights: torch.Tensor, state, evict: Callable, drops: torch.Tensor | None = None
) -> Routing:
    """As :func:`cachemoe.kernels.reference_route.place`; the tensors of ``state`` are contiguous."""
    caches, tokens, k = ids.shape
    if (least := min(state.capacity.tolist())) < k:
        raise ValueError(f"{least} slots cannot hold the {k} experts of one token")
    weights = weights.detach().float().numpy()
    order = (-weights).argsort(-1, kind="stable")
    chosen = np.take_along_axis(ids.numpy(), order, -1)
    kept = None if drops is None else np.take_along_axis(~drops.numpy(), order, -1)
    step = _step_one if caches == 1 else _step
    keep = None if kept is None else lambda at, *_: kept[at]
    ids, slots, hits, *misses = step(lambda at, _: chosen[at], keep, state, evict, tokens, k)
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
        Those of the K experts that would run, the highest selection value first.
    """
    needs_gates = correction is not None or scores.groups > 1 or "before" in policy.words
    needs_gates = needs_gates or policy.grade is not None or policy.bounded
    ranked = _rank(logits[None, None], scores, correction, needs_gates)
    if ranked is None:
        anyone = (lambda last_use, uses: last_use), top_k
        routing = reference_route.route(logits[None, None], state.clone(), *anyone, policy, scores, correction)
        return routing.ids[routing.slots >= 0].tolist()
    *ranked, _ = ranked
    mean_range = [[state.range_sum.item() / max(state.tokens.item(), 1)]]
    choose, keep = _chooser(*ranked, state.tokens.tolist(), mean_range, policy, scores, top_k)
    slot_of = state.slot_of.numpy()[0]
    chosen = choose((0, 0), slot_of)
    return (chosen if keep is None else chosen[keep((0, 0), chosen, slot_of)]).tolist()


def _rank(logits, scores, correction, needs_gates=True):
    """What does not depend on residency: selection values, negated, ``[B, T, E]``; experts in order of them, and where
    these stand in a flat array; gate scores if needed; the values' ranges ``[B, T]``. None where a value is not finite,
    as only a router gone astray has it: numpy would sort NaN last."""
    if logits.requires_grad:
        logits = logits.detach()
    if logits.dtype != torch.float32:
        logits = logits.float()
    gates = reference_route.gate_scores(logits, scores) if needs_gates else logits
    corrected = gates if correction is None else gates + correction.float().reshape(-1, 1, logits.shape[2])
    negated = -(logits if correction is None else corrected).numpy()
    order = negated.argsort(-1, kind="stable")
    experts = order.shape[2]
    places = _places(order, experts)
    ends = negated.take(places[..., :: max(experts - 1, 1)])  # the highest and the lowest, or the only one
    if not sum(map(abs, ends.ravel().tolist())) < LARGE:  # NaN is not, either
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


def _chooser(negated, order, places, gates, first, mean_range, policy, scores, k):
    """The policy as two functions, of a token's index into ``[B, T, E]``, of one cache or of all: ``choose``, with
    ``slot_of`` ``[..., E]``, gives the chosen experts ``[..., K]``, the highest selection value first; ``keep``, with
    these and ``slot_of``, whether each of them runs, and is None where all do."""
    knobs = None if policy.knobs is None else policy.knobs_on_host
    keep = None if policy.grade is None else _keeper(negated, gates, first, knobs, policy, k)
    if policy.key is None:
        return (lambda at, slot_of: order[at][..., :k]), keep
    arguments, by_token, place_of = [None] * len(policy.words), [], policy.place_of
    rank = np.empty(order.shape, np.int64)
    rank.put(places, _numbers(order.shape[2]))
    for word, place in place_of.items():
        if word in KNOBS:
            i = KNOBS.index(word)
            arguments[place] = knobs[0, i] if len(order) == 1 else knobs[:, i, None]
        elif word == "value":
            by_token.append((place, -negated))
        elif word == "rank":
            by_token.append((place, rank.astype(np.float32)))
        elif word == "before":
            by_token.append((place, _before(gates, places, rank, scores)))
        elif word == "span":
            by_token.append((place, np.array(mean_range, np.float32)[..., None]))
        elif word == "noise":
            by_token.append((place, _noise(first, knobs, order.shape)))
    have_at, cost_at, bounded = place_of.get("have"), place_of.get("cost"), policy.bounded
    key, alone = policy.key, len(order) == 1
    if alone:
        kept = order[..., : min(int(knobs[0, 0]), k)]
    else:
        kept = rank < np.minimum(knobs[:, None, :1], k)
    closed = None if scores.top_groups == scores.groups else np.isinf(negated)  # groups not to choose from

    def choose(at, slot_of):
        for place, values in by_token:
            arguments[place] = values[at]
        if have_at is not None:
            arguments[have_at] = (slot_of >= 0).view(INT8)
        if cost_at is not None:
            arguments[cost_at] = _miss_cost(knobs) * (slot_of < 0)
        smallest = -key(*arguments)
        if smallest.dtype.char != "f":
            smallest = smallest.astype(np.float32)
        if closed is not None:
            smallest[closed[at]] = np.inf
        smallest[kept[at]] = -np.inf
        if alone:
            ranks = rank[at].take(smallest.argsort(kind="stable")[:k])
        else:
            ranks = _take(rank[at], smallest.argsort(-1, kind="stable")[:, :k])
        ranks.sort()
        if bounded:
            ranks = _bounded(ranks, _take(gates[at], order[at]), knobs[:, KNOBS.index("regret")])
        return order[at].take(ranks) if alone else _take(order[at], ranks)

    return choose, keep


@cache
def _numbers(count):
    return np.arange(count)


def _keeper(negated, gates, first, knobs, policy, k):
    """``keep`` of ``_chooser``."""
    words = policy.grade_words
    known = {"place": PLACES[:k]}
    for i, knob in enumerate(KNOBS):
        known[knob] = knobs[0, i] if len(knobs) == 1 else knobs[:, i, None]
    seen = {}
    if "value" in words:
        seen["value"] = -negated
    if "noise" in words:
        seen["noise"] = _noise(first, knobs, gates.shape)
    weighs = any(word in words for word in ("weight", "first", "before"))

    def keep(at, chosen, slot_of):
        if weighs:
            weight = _take(gates[at], chosen)
            weight = weight / np.maximum(weight.cumsum(-1)[..., -1:], TINY)
            known["weight"], known["first"] = weight, weight[..., :1]
            if "before" in words:
                known["before"] = np.zeros_like(weight)
                weight[..., :-1].cumsum(-1, out=known["before"][..., 1:])
        for word in seen:
            known[word] = _take(seen[word][at], chosen)
        if "have" in words or "cost" in words:
            absent = _take(slot_of, chosen) < 0
            known["have"], known["cost"] = (~absent).view(INT8), _miss_cost(knobs) * absent
        dropped = policy.grade(*[known[word] for word in words]) < 0
        return np.broadcast_to(~(dropped & (PLACES[:k] > 0)), chosen.shape)

    return keep


def _miss_cost(knobs):
    """Of one cache a number, of several ``[B, 1]``."""
    i = KNOBS.index("miss")
    return knobs[0, i] if len(knobs) == 1 else knobs[:, i, None]


def _noise(first, knobs, shape):
    """``[B, T, E]``: of each cache from the token that it has come to."""
    _, tokens, experts = shape
    begins = (np.array(first) * experts + (knobs[:, KNOBS.index("seed")].astype(np.int64) << 24))[:, None, None]
    return noise_bits(begins + np.arange(tokens * experts).reshape(tokens, experts)).astype(np.float32) * SCALE


def _bounded(ranks, scores, regret):
    """As in the reference: ``ranks`` ``[..., K]``, ``scores`` ``[..., E]`` by rank, ``regret`` ``[B]``."""
    if ranks.ndim > 1:
        return np.stack([_bounded(*each) for each in zip(ranks, scores, regret[:, None], strict=True)])
    row, k = ranks.tolist(), len(ranks)
    brought_in = [r for r in row if r >= k]
    left = [r for r in range(k - 1, -1, -1) if r not in row] if brought_in else []
    for new, old in zip(brought_in, left, strict=True):
        if not (0 < regret and scores[old] - scores[new] < regret):
            row[row.index(new)] = old
    return np.array(sorted(row))


def _take(values, positions):
    """Along the last dimension, for one cache or several."""
    return values.take(positions) if values.ndim == 1 else values[np.arange(len(values))[:, None], positions]


def _before(gates, places, rank, scores):
    """``[B, T, E]``: of each expert the share of the scores that the better-ranked have."""
    if scores.function != "softmax":
        gates = gates / np.maximum(gates.sum(-1, keepdims=True), np.finfo(np.float32).tiny)
    # As torch sums: in float64, each partial sum rounded.
    upto, by_rank = gates.take(places).astype(np.float64).cumsum(-1), np.zeros(gates.shape, np.float32)
    by_rank[..., 1:] = upto[..., :-1]
    return by_rank.take(_places(rank, rank.shape[2]))


def _step_one(choose, keep, state, evict, tokens, k):
    """Step one cache: choose, touch and place each token's experts.

    Returns:
        The arrays of a ``Routing`` in order, but for the weights.
    """
    slot_of, expert_of = state.slot_of.numpy()[0], state.expert_of.numpy()[0]
    last_use, uses, clocks = state.last_use.numpy()[0], state.uses.numpy()[0], state.clock.numpy()
    capacity, clock = state.capacity.item(), clocks.item()
    ids, slots = np.empty((1, tokens, k), np.int64), np.empty((1, tokens, k), np.int64)
    hits, missed, taken = np.empty((1, tokens, k), np.bool_), [], []
    for t in range(tokens):
        ids[0, t] = chosen = choose((0, t), slot_of)
        touches = np.arange(clock + k, clock, -1)
        if keep is not None:
            kept = keep((0, t), chosen, slot_of).nonzero()[0]
            chosen, touches = chosen[kept], touches[kept]
        where = slot_of.take(chosen)
        found, placed = where >= 0, where.tolist()
        last_use[chosen] = touches
        uses[chosen] += 1
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
        if keep is None:
            slots[0, t], hits[0, t] = placed, found
        else:
            slots[0, t], hits[0, t] = -1, False
            slots[0, t, kept], hits[0, t, kept] = placed, found
        clock += k
    clocks[0] = clock
    count, nothing = len(missed), [-1] * (tokens * k - len(missed))
    misses = np.array([missed + nothing]), np.array([taken + nothing]), np.array([count])
    return ids, slots, hits, *misses


def _step(choose, keep, state, evict, tokens, k):
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
    places = np.arange(k, 0, -1)
    kept = slice(None)
    for t in range(tokens):
        chosen = choose((slice(None), t), slot_of)
        entries = chosen + first
        placed = flat_slot_of[entries]
        before = clock.copy()
        touches = before[:, None] + places
        ids[:, t], hits[:, t] = chosen, placed >= 0
        missing = ~hits[:, t]
        if keep is not None:
            kept = keep((slice(None), t), chosen, slot_of)
            placed[~kept] = -1
            hits[:, t] &= kept
            missing &= kept
        flat_last_use[entries[kept]] = touches[kept]
        flat_uses[entries[kept]] += 1
        clock += k
        if missing.any():
            _place(chosen, placed, missing, before, first, state, evict, misses)
        slots[:, t] = placed
    return ids, slots, hits, *misses


def _place(chosen, placed, missing, untouched, first, state, evict, misses):
    """Give absent experts the slots of those that leave.

    Args:
        chosen, placed: ``[B, K]`` experts and their slots; filled in where ``missing``.
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
    for b, k in np.argwhere(missing).tolist():
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
