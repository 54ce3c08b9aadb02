"""``route`` on the CPU: numpy over the tensors' memory, since for one token torch's overhead exceeds the work.

What does not depend on residency is computed for all tokens at once; then the tokens are stepped, B caches side by side.
"""

from collections.abc import Callable

import numpy as np
import torch

from cachemoe.kernels import reference
from cachemoe.kernels.reference import CacheBias, GateScores, Routing

NEVER, FIRST = np.iinfo(np.int64).max, np.iinfo(np.int64).min


def route_cpu(
    logits: torch.Tensor,
    state,
    evict: Callable,
    top_k: int,
    bias: CacheBias,
    scores: GateScores,
    correction: torch.Tensor | None,
    out: Routing,
) -> None:
    """As :func:`cachemoe.kernels.reference.route`, into ``out``; the tensors of state and out are contiguous."""
    if (least := state.capacity.numpy().min()) < top_k:
        raise ValueError(f"{least} slots cannot hold the {top_k} experts of one token")
    logits = logits.detach().float()
    gates = reference.gate_scores(logits, scores)
    values = logits if correction is None else gates + correction.float().reshape(-1, 1, logits.shape[2])
    low, high = torch.aminmax(values, dim=-1)
    ranges = (high - low).numpy()
    if not np.isfinite(ranges).all():  # numpy sorts NaN last, and a range that overflows is a case of its own
        routing = reference.route(logits, state, evict, top_k, bias, scores, correction)
        for tensor, result in zip(out.tensors(), routing.tensors(), strict=True):
            tensor.copy_(result)
        return

    candidates = None
    if scores.top_groups < scores.groups:
        candidates = reference.candidates(values, gates if correction is None else values, scores)
        values, candidates = values.masked_fill(~candidates, -torch.inf), candidates.numpy()
    values, gates = values.numpy(), gates.numpy()
    order = (-values).argsort(-1, kind="stable")
    mean_range = _mean_range(ranges, state)
    choose = _original(order, top_k)
    if any(value is not None for value in map(_per_cache, (bias.window, bias.mass, bias.prior))):
        choose = _biased(values, order, gates, candidates, mean_range, bias, scores, state, top_k)
    _step(choose, state, evict, out)

    ids, weights = out.ids.numpy(), out.weights.numpy()
    np.take(gates, ids + _rows(order), out=weights)
    if scores.renormalise:
        weights /= weights.sum(-1, keepdims=True) + np.float32(scores.epsilon)
    if scores.scale != 1:
        weights *= np.float32(scores.scale)


def _per_cache(value):
    """A parameter of ``CacheBias`` against ``[B, T, E]``; None for the number 0, which asks for nothing."""
    if isinstance(value, torch.Tensor):
        return value.numpy().reshape(-1, 1, 1)
    return value or None


def _rows(array):
    """``[B, T, 1]``: where each token's row of a ``[B, T, E]`` array begins."""
    return np.arange(0, array.size, array.shape[2]).reshape(*array.shape[:2], 1)


def _mean_range(ranges, state):
    """``[B, T, 1]`` float32: the mean range over the tokens before each. Adds ``ranges`` ``[B, T]`` to the state."""
    seen, range_sum = state.tokens.numpy(), state.range_sum.numpy()
    # Summed in order in float64, so that a sequence cut anywhere gives the same bits.
    sums = np.concatenate((range_sum[:, None], ranges), 1).cumsum(1)
    past = seen[:, None] + np.arange(ranges.shape[1])
    range_sum[:] = sums[:, -1]
    seen += ranges.shape[1]
    return (sums[:, :-1] / np.maximum(past, 1)).astype(np.float32)[..., None]


def _original(order, top_k):
    """The best K of each token."""
    return lambda t: order[:, t, :top_k]


def _biased(values, order, gates, candidates, mean_range, bias, scores, state, top_k):
    """Gives token t's experts from the residency at the time of the call, ``[B, K]``, best first."""
    caches, tokens, experts = order.shape
    rows, slot_of = _rows(order), state.slot_of.numpy()
    rank = np.empty_like(order)
    rank.reshape(-1)[order + rows] = np.arange(experts)
    top_j, window, mass, prior = map(_per_cache, (bias.top_j, bias.window, bias.mass, bias.prior))

    # The smallest keys are chosen; a resident's is less by ``less``. No key is NaN: outside the groups it is infinite.
    if window is None and mass is None:
        key, less = -values, np.float32(prior) * mean_range
    else:
        size = 0 if window is None else window
        if mass is not None:
            size = np.maximum(size, _mass_window(gates, order, np.float32(mass), scores))
        key, promoted = rank.astype(np.float32), rank < size
        if candidates is not None:
            promoted &= candidates
            key[~candidates] = np.inf
        less = promoted * np.float32(experts)
        if prior is not None:
            key, less = np.where(prior > 0, -values, key), np.where(prior > 0, np.float32(prior) * mean_range, less)
    if top_j is not None:
        key[rank < np.minimum(top_j, top_k)] = -np.inf

    def choose(t):
        chosen = (key[:, t] - less[:, t] * (slot_of >= 0)).argsort(-1, kind="stable")[:, :top_k]
        ranks = rank.take(chosen + rows[:, t])
        ranks.sort(-1)
        return order.take(ranks + rows[:, t])

    return choose


def _mass_window(gates, order, mass, scores):
    """``[B, T, 1]``: the fewest best-ranked experts whose scores are ``mass`` of the sum of all."""
    if scores.function != "softmax":
        gates = gates / np.maximum(gates.sum(-1, keepdims=True), np.finfo(np.float32).tiny)
    before = np.zeros_like(gates)
    # As torch sums: in float64, each partial sum rounded.
    before[..., 1:] = np.take_along_axis(gates, order, -1).cumsum(-1, dtype=np.float64)[..., :-1]
    return ((before < mass) | (mass >= 1)).sum(-1, keepdims=True)


def _step(choose, state, evict, out):
    """Touch and place each token's experts; fills in all of ``out`` but the weights."""
    slot_of, last_use, uses = state.slot_of.numpy(), state.last_use.numpy(), state.uses.numpy()
    clock, waves, count = state.clock.numpy(), out.waves.numpy(), out.misses.count.numpy()
    ids, slots, hits = out.ids.numpy(), out.slots.numpy(), out.hits.numpy()
    caches, tokens, k = ids.shape
    first = np.arange(0, slot_of.size, slot_of.shape[1])[:, None]  # of each cache in the flat arrays
    slots_by_expert, last_uses, all_uses = slot_of.reshape(-1), last_use.reshape(-1), uses.reshape(-1)
    touches = np.arange(k, 0, -1)

    count[:] = 0
    out.misses.experts.numpy().fill(-1)
    out.misses.slots.numpy().fill(-1)
    wave, wave_start = np.zeros_like(clock), clock.copy()
    for t in range(tokens):
        ids[:, t] = chosen = choose(t)
        entries = chosen + first
        slots[:, t] = chosen_slots = slots_by_expert[entries]
        hits[:, t] = resident = chosen_slots >= 0
        before = clock.copy()
        last_uses[entries] = before[:, None] + touches
        all_uses[entries] += 1
        clock += k
        if not resident.all():
            slots[:, t], last_left = _place(chosen, chosen_slots, resident, before, state, evict, out.misses)
            again = last_left > wave_start
            wave += again
            np.copyto(wave_start, before, where=again)
        waves[:, t] = wave


def _place(chosen, slots, resident, untouched, state, evict, misses):
    """Give absent experts the slots of those that leave.

    Args:
        chosen, slots, resident: ``[B, K]``.
        untouched: ``[B]`` the clock before the token.

    Returns:
        ``[B, K]`` slots, and ``[B]`` the latest ``last_use`` of an expert that left, -1 where none did.
    """
    expert_of, slot_of, last_use = state.expert_of.numpy(), state.slot_of.numpy(), state.last_use.numpy()
    first = np.arange(0, slot_of.size, slot_of.shape[1])[:, None]
    occupants = np.maximum(expert_of, 0) + first
    slot = np.arange(expert_of.shape[1])
    key = evict(last_use, state.uses.numpy()).take(occupants)
    key[last_use.take(occupants) > untouched[:, None]] = NEVER
    free = expert_of < 0
    if free.any():
        key = np.where(free, np.where(slot < state.capacity.numpy()[:, None], FIRST + slot, NEVER), key)
    victims = key.argsort(-1, kind="stable")

    last_left = np.full(len(chosen), -1)
    experts, places, count = misses.experts.numpy(), misses.slots.numpy(), misses.count.numpy()
    nth = [0] * len(chosen)
    for b, k in np.argwhere(~resident).tolist():
        expert, slot = chosen[b, k], victims[b, nth[b]]
        old = expert_of[b, slot]
        if old >= 0:
            slot_of[b, old] = -1
            last_left[b] = max(last_left[b], last_use[b, old])
        slot_of[b, expert] = slot
        expert_of[b, slot] = expert
        slots[b, k] = slot
        experts[b, count[b]] = expert
        places[b, count[b]] = slot
        count[b] += 1
        nth[b] += 1
    return slots, last_left
