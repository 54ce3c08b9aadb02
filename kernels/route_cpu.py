"""``route`` on the CPU: numpy over the tensors' memory, since for one token torch's overhead exceeds the work.

What does not depend on residency is computed for all tokens at once. Then the tokens are stepped: several caches side
by side; a single one, as in decode, with Python's own numbers.
"""

from collections.abc import Callable

import numpy as np
import torch

from cachemoe.kernels import reference
from cachemoe.kernels.reference import CacheBias, GateScores, Misses, Routing

LARGE = 1e38  # the difference of smaller numbers is finite in float32
NEVER, FIRST = np.iinfo(np.int64).max, np.iinfo(np.int64).min


def route_cpu(
    logits: torch.Tensor,
    state,
    evict: Callable,
    top_k: int,
    bias: CacheBias,
    scores: GateScores,
    correction: torch.Tensor | None,
    out: Routing | None,
) -> Routing:
    """As :func:`cachemoe.kernels.reference.route`; the tensors of ``state`` and ``out`` are contiguous."""
    if (least := min(state.capacity.tolist())) < top_k:
        raise ValueError(f"{least} slots cannot hold the {top_k} experts of one token")
    logits = logits.detach().float()
    gates = reference.gate_scores(logits, scores)
    corrected = gates if correction is None else gates + correction.float().reshape(-1, 1, logits.shape[2])
    negated = -(logits if correction is None else corrected).numpy()
    order = negated.argsort(-1, kind="stable")
    caches, tokens, experts = order.shape
    rows = np.arange(0, order.size, experts).reshape(caches, tokens, 1)  # where each token begins in a flat array
    ends = negated.take(order[..., :: max(experts - 1, 1)] + rows)
    if not np.abs(ends).max() < LARGE:  # numpy sorts NaN last; only a router gone astray comes here
        routing = reference.route(logits, state, evict, top_k, bias, scores, correction)
        if out is None:
            return routing
        for tensor, result in zip(out.tensors(), routing.tensors(), strict=True):
            tensor.copy_(result)
        return out

    gates, candidates = gates.numpy(), None
    if scores.top_groups < scores.groups:
        candidates = reference.candidates(torch.from_numpy(-negated), corrected, scores).numpy()
        negated = np.where(candidates, negated, np.float32(np.inf))
        order = negated.argsort(-1, kind="stable")
    mean_range = _mean_range(ends[..., -1] - ends[..., 0], state)
    biased = _biased(negated, order, rows, gates, candidates, mean_range, bias, scores, top_k)

    results = _empty(caches, tokens, top_k) if out is None else [tensor.numpy() for tensor in out.tensors()]
    ids, weights, slots, hits, waves, *misses = results
    if caches == 1:
        _step_one(negated[0], order[0], biased, state, evict, ids[0], slots[0], hits[0], waves[0], misses)
    else:
        _step(negated, order, rows, biased, state, evict, ids, slots, hits, waves, misses)

    gates.reshape(-1).take(ids + rows, out=weights)
    if scores.renormalise:
        weights /= weights.sum(-1, keepdims=True) + np.float32(scores.epsilon)
    if scores.scale != 1:
        weights *= np.float32(scores.scale)
    if out is None:
        *tensors, miss_experts, miss_slots, miss_count = map(torch.from_numpy, results)
        out = Routing(*tensors, Misses(miss_experts, miss_slots, miss_count))
    return out


def _empty(caches, tokens, top_k):
    """The arrays of a ``Routing``."""
    chosen, listed = (caches, tokens, top_k), (caches, tokens * top_k)
    ids, slots = np.empty(chosen, np.int64), np.empty(chosen, np.int64)
    weights, hits, waves = np.empty(chosen, np.float32), np.empty(chosen, np.bool_), np.empty(chosen[:2], np.int64)
    return (
        ids,
        weights,
        slots,
        hits,
        waves,
        np.empty(listed, np.int64),
        np.empty(listed, np.int64),
        np.empty(caches, np.int64),
    )


def _mean_range(ranges, state):
    """``[B, T, 1]`` float32: the mean range over the tokens before each. Adds ``ranges`` ``[B, T]`` to the state.

    Summed in order in float64, so that a sequence cut anywhere gives the same bits.
    """
    seen, range_sum = state.tokens.numpy(), state.range_sum.numpy()
    tokens = ranges.shape[1]
    if len(ranges) == 1:
        means, past, total = [], int(seen[0]), float(range_sum[0])
        for added in ranges[0].tolist():
            means.append(total / max(past, 1))
            past, total = past + 1, total + added
        seen[0], range_sum[0] = past, total
        return np.array(means, np.float32).reshape(1, tokens, 1)
    past = np.maximum(seen[:, None] + np.arange(tokens), 1)
    sums = np.concatenate((range_sum[:, None], ranges), 1).cumsum(1)
    range_sum[:] = sums[:, -1]
    seen += tokens
    return (sums[:, :-1] / past).astype(np.float32)[..., None]


def _per_cache(value):
    """A parameter of ``CacheBias`` against ``[B, T, E]``; None for the number 0, which asks for nothing."""
    if isinstance(value, torch.Tensor):
        return value.numpy().reshape(-1, 1, 1)
    return value or None


def _biased(negated, order, rows, gates, candidates, mean_range, bias, scores, top_k):
    """``[B, T, E]`` float32 keys, the smallest chosen, and by how much a resident's is less; None without a bias.

    No key is NaN: outside the groups that a token may choose from it is infinite, of what is always kept minus that.
    """
    top_j, window, mass, prior = map(_per_cache, (bias.top_j, bias.window, bias.mass, bias.prior))
    if window is None and mass is None:
        if prior is None:
            return None
        key, less = negated.copy(), np.float32(prior) * mean_range
    else:
        size = 0 if window is None else window
        if mass is not None:
            size = np.maximum(size, _mass_window(gates, order, np.float32(mass), scores))
        key = np.empty_like(negated)
        key.reshape(-1)[order + rows] = np.arange(order.shape[2])
        less = (key < size) * np.float32(order.shape[2])
        if candidates is not None:
            less *= candidates
            key[~candidates] = np.inf
        if prior is not None:
            key, less = np.where(prior > 0, negated, key), np.where(prior > 0, np.float32(prior) * mean_range, less)
    if top_j is not None:
        flat = key.reshape(-1)
        if isinstance(top_j, int):
            flat[order[..., : min(top_j, top_k)] + rows] = -np.inf
        else:
            best = order[..., :top_k] + rows
            flat[best] = np.where(np.arange(top_k) < top_j, -np.inf, flat[best])
    return key, less


def _mass_window(gates, order, mass, scores):
    """``[B, T, 1]``: the fewest best-ranked experts whose scores are ``mass`` of the sum of all."""
    if scores.function != "softmax":
        gates = gates / np.maximum(gates.sum(-1, keepdims=True), np.finfo(np.float32).tiny)
    before = np.zeros_like(gates)
    # As torch sums: in float64, each partial sum rounded.
    before[..., 1:] = np.take_along_axis(gates, order, -1).cumsum(-1, dtype=np.float64)[..., :-1]
    return ((before < mass) | (mass >= 1)).sum(-1, keepdims=True)


def _step_one(negated, order, biased, state, evict, ids, slots, hits, waves, misses):
    """Step one cache: choose, touch and place each token's experts. ``[T, ...]`` arrays; fills in the last five."""
    slot_of, expert_of = state.slot_of.numpy()[0], state.expert_of.numpy()[0]
    last_use, uses, clocks = state.last_use.numpy()[0], state.uses.numpy()[0], state.clock.numpy()
    (capacity,) = state.capacity.tolist()
    tokens, k = ids.shape
    touches = np.arange(k, 0, -1)
    clock = int(clocks[0])
    wave, wave_start, missed = 0, clock, []
    for t in range(tokens):
        if biased is None:
            chosen = order[t, :k]
        else:
            key, less = biased
            chosen = (key[0, t] - less[0, t] * (slot_of >= 0)).argsort(kind="stable")[:k]
            chosen.sort()
            chosen = chosen.take(negated[t].take(chosen).argsort(kind="stable"))
        placed = slot_of.take(chosen).tolist()
        ids[t], hits[t] = chosen, [slot >= 0 for slot in placed]
        last_use[chosen] = touches + clock
        uses[chosen] += 1
        if min(placed) < 0:
            occupants = expert_of[:capacity]
            keys = evict(last_use, uses).take(occupants)
            free = (occupants < 0).nonzero()[0]
            keys[free] = FIRST + free
            keys[[slot for slot in placed if slot >= 0]] = NEVER
            last_left = -1
            for i, expert in enumerate(chosen.tolist()):
                if placed[i] < 0:
                    placed[i] = slot = int(keys.argmin())
                    keys[slot] = NEVER
                    old = int(expert_of[slot])
                    if old >= 0:
                        slot_of[old] = -1
                        last_left = max(last_left, int(last_use[old]))
                    slot_of[expert], expert_of[slot] = slot, expert
                    missed.append((expert, slot))
            if last_left > wave_start:
                wave, wave_start = wave + 1, clock
        slots[t], waves[t] = placed, wave
        clock += k
    clocks[0] = clock
    experts, places, count = misses
    experts.fill(-1)
    places.fill(-1)
    count[0] = len(missed)
    for i, (expert, slot) in enumerate(missed):
        experts[0, i], places[0, i] = expert, slot


def _step(negated, order, rows, biased, state, evict, ids, slots, hits, waves, misses):
    """As ``_step_one`` for B caches, on ``[B, T, ...]`` arrays."""
    slot_of, last_use, uses = state.slot_of.numpy(), state.last_use.numpy(), state.uses.numpy()
    first = np.arange(0, slot_of.size, slot_of.shape[1])[:, None]  # of each cache in the flat arrays
    clock, flat_slot_of, flat_last_use, flat_uses = (
        state.clock.numpy(),
        *(a.reshape(-1) for a in (slot_of, last_use, uses)),
    )
    k = ids.shape[2]
    touches = np.arange(k, 0, -1)
    for listed, nothing in zip(misses, (-1, -1, 0), strict=True):
        listed.fill(nothing)
    wave, wave_start = np.zeros_like(clock), clock.copy()
    for t in range(ids.shape[1]):
        if biased is None:
            chosen = order[:, t, :k]
        else:
            key, less = biased
            chosen = (key[:, t] - less[:, t] * (slot_of >= 0)).argsort(-1, kind="stable")[:, :k]
            chosen.sort(-1)
            by_value = negated.take(chosen + rows[:, t]).argsort(-1, kind="stable")
            chosen = np.take_along_axis(chosen, by_value, -1)
        entries = chosen + first
        placed = flat_slot_of[entries]
        ids[:, t], hits[:, t] = chosen, placed >= 0
        before = clock.copy()
        flat_last_use[entries] = before[:, None] + touches
        flat_uses[entries] += 1
        clock += k
        if not hits[:, t].all():
            last_left = _place(chosen, placed, before, first, state, evict, misses)
            again = last_left > wave_start
            wave += again
            np.copyto(wave_start, before, where=again)
        slots[:, t], waves[:, t] = placed, wave


def _place(chosen, placed, untouched, first, state, evict, misses):
    """Give absent experts the slots of those that leave.

    Args:
        chosen, placed: ``[B, K]`` experts and their slots, -1 where absent; filled in.
        untouched: ``[B]`` the clock before the token.
        first: ``[B, 1]`` where each cache begins in a flat array.

    Returns:
        ``[B]`` the latest ``last_use`` of an expert that left, -1 where none did.
    """
    expert_of, slot_of, last_use = state.expert_of.numpy(), state.slot_of.numpy(), state.last_use.numpy()
    occupants = np.maximum(expert_of, 0) + first
    key = evict(last_use, state.uses.numpy()).take(occupants)
    key[last_use.take(occupants) > untouched[:, None]] = NEVER
    free = expert_of < 0
    if free.any():
        slot = np.arange(expert_of.shape[1])
        key = np.where(free, np.where(slot < state.capacity.numpy()[:, None], FIRST + slot, NEVER), key)
    victims = key.argsort(-1, kind="stable")

    last_left = np.full(len(chosen), -1)
    experts, places, count = misses
    nth = [0] * len(chosen)
    for b, k in np.argwhere(placed < 0).tolist():
        expert, slot = chosen[b, k], victims[b, nth[b]]
        old = expert_of[b, slot]
        if old >= 0:
            slot_of[b, old] = -1
            last_left[b] = max(last_left[b], last_use[b, old])
        slot_of[b, expert] = slot
        expert_of[b, slot] = expert
        placed[b, k] = slot
        experts[b, count[b]] = expert
        places[b, count[b]] = slot
        count[b] += 1
        nth[b] += 1
    return last_left
