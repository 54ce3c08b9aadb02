"""Several sequences that take their steps together, over one cache, on the CPU.

All sequences of a step see the residency that the step before left, so that their order changes nothing. Then each page
that any of them runs is touched once: the best of every sequence before the second of any, those of one place by their
highest gate weight. The absent ones take slots as one token's do; where a step runs more pages of a level than there
are slots, the first of that order have them afterwards.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from cachemoe.kernels import route_c
from cachemoe.kernels.policy import ORIGINAL, Policy
from cachemoe.kernels.reference_route import check_slots, gate_scores, settle
from cachemoe.kernels.route import route
from cachemoe.kernels.route_cpu import is_plain
from cachemoe.kernels.state import GateScores, Misses, Residency, Routing


@torch.no_grad()
def route_batch(
    logits: torch.Tensor,
    state: Residency,
    evict: Callable,
    top_k: int,
    policy: Policy,
    scores: GateScores,
    correction: torch.Tensor | None = None,
) -> Routing:
    """``route`` for N sequences of T steps; for one the same, but that experts which a policy drops take no touch.

    Args:
        logits: ``[N, T, E]``.
        state: of one cache (B = 1).
        evict, top_k, policy, scores, correction: as for ``route``; ``noise`` is the same for all sequences of a step.

    Returns:
        Of one cache and N * T tokens, sequence by sequence. ``hits`` is of before the step; of a page that has no slot
        after it, ``slots`` says the level alone.
    """
    if is_plain(state, policy):
        check_slots(state, top_k)
        routing = route_c.route(logits, state, evict, top_k, policy, scores, correction)
        if routing is not None:
            return routing
    count, steps, _ = logits.shape
    values = logits.float() if correction is None else gate_scores(logits.float(), scores) + correction.float()
    ranges = (values.amax(-1) - values.amin(-1)).double()
    policy, out, missed = policy.repeated(count), Routing.empty(count, steps, top_k), []
    if state.levels > 1 or policy.swaps:
        out.asked = torch.empty_like(out.ids)
    for t in range(steps):
        routing = route(logits[:, t : t + 1], state.repeated(count), evict, top_k, policy, scores, correction)
        for added in sorted(ranges[:, t].tolist()):
            state.range_sum.add_(added if math.isfinite(added) else 0.0)
        state.tokens.add_(count)
        out.ids[:, t], out.weights[:, t], out.hits[:, t] = routing.ids[:, 0], routing.weights[:, 0], routing.hits[:, 0]
        if out.asked is not None:
            out.asked[:, t] = routing.asked[:, 0]
        ran, levels = routing.ids[:, 0], state.levels_of(routing.slots[:, 0])
        pages = torch.where(levels < 0, -1, levels * state.experts + ran)
        out.slots[:, t] = _touch_and_place(pages, routing.weights[:, 0], state, evict, missed)
    return _of_one_cache(out, missed)


@torch.no_grad()
def place_batch(
    ids: torch.Tensor, weights: torch.Tensor, state: Residency, evict: Callable, drops: torch.Tensor | None = None
) -> Routing:
    """``place`` for N sequences of T steps, as ``route_batch``.

    Args:
        ids, weights, drops: ``[N, T, K]``, as for ``place``.
        state, evict: as for ``route_batch``.
    """
    count, steps, k = ids.shape
    check_slots(state, k)
    order = weights.float().argsort(dim=-1, descending=True, stable=True)
    out, missed = Routing.empty(count, steps, k), []
    out.ids, out.weights = ids.gather(-1, order), weights.float().gather(-1, order)
    if drops is None and is_plain(state, ORIGINAL):
        routing = route_c.place(out.ids, out.weights, state, evict)
        if routing is not None:
            return routing
    pages = out.ids if drops is None else out.ids.masked_fill(drops.gather(-1, order), -1)
    for t in range(steps):
        here = pages[:, t]
        out.hits[:, t] = (here >= 0) & (state.slot_of[0, state.layer * state.levels * state.experts + here] >= 0)
        out.slots[:, t] = _touch_and_place(here, out.weights[:, t], state, evict, missed)
    return _of_one_cache(out, missed)


def _touch_and_place(
    pages: torch.Tensor, weights: torch.Tensor, state: Residency, evict: Callable, missed: list
) -> torch.Tensor:
    """``[N, K]`` the slots of a step's pages ``[N, K]``, -1 of those that do not run.

    Args:
        missed: to which the pages that had none and their new slots are added.
    """
    places = np.broadcast_to(np.arange(pages.shape[1]), pages.shape)
    entries = zip(places.ravel().tolist(), (-weights).flatten().tolist(), pages.flatten().tolist(), strict=True)
    room = [end - first for first, end in state.slots]
    room[0] = state.capacity.item()
    slot_of = state.slot_of[0, state.layer * state.levels * state.experts :].tolist()
    ran = []
    for page in dict.fromkeys(page for _, _, page in sorted(entries) if page >= 0):
        level, expert = divmod(page, state.experts)
        room[level] -= 1
        if room[level] >= 0:
            ran.append((expert, page, page, slot_of[page] >= 0))
    placed, new = settle(ran, state, 0, evict)
    missed += new
    slots = [[placed.get(page, state.slots[page // state.experts][0]) for page in row] for row in pages.tolist()]
    return torch.tensor(slots, device="cpu").masked_fill(pages < 0, -1)


def _of_one_cache(routing: Routing, missed: list[tuple[int, int]]) -> Routing:
    """``[1, N * T, ...]`` of ``[N, T, ...]``, with these misses."""
    ids, weights, slots, hits = (each.flatten(0, 1)[None] for each in routing.tensors()[:4])
    asked = None if routing.asked is None else routing.asked.flatten(0, 1)[None]
    listed = [*missed, *[(-1, -1)] * (ids.numel() - len(missed))]
    pages, places = torch.tensor(listed, dtype=torch.int64, device="cpu").view(-1, 2).T[:, None].contiguous()
    count = torch.tensor([len(missed)], device="cpu")
    return Routing(ids, weights, slots, hits, Misses(pages, places, count), asked)
