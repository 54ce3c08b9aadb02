"""Cache policies on a recorded trace of expert selections, without moving a page."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf

import torch

from cachemoe.kernels.policy import Policy
from cachemoe.kernels.route import route
from cachemoe.kernels.state import SOFTMAX, GateScores, Residency, Routing
from cachemoe.offload.residency import least_recently_used


def belady_misses(ids: torch.Tensor, capacity: int) -> int:
    """Misses of the optimal eviction with hindsight (Belady's MIN): the expert whose next use is farthest leaves.

    Optimal for this trace only: a router that sees the cache changes the trace and may miss less.

    Args:
        ids, capacity: as for ``lookahead_misses``.

    Raises:
        ValueError: as ``lookahead_misses``.
    """
    return lookahead_misses(ids, capacity, inf)


def lookahead_misses(ids: torch.Tensor, capacity: int, window: float) -> int:
    """Misses of an eviction that knows the uses of the next W tokens (after Read-ME, arXiv 2410.19123, section 4).

    Experts that none of these tokens uses leave first, the least recently used of them before the others; then the
    one whose next use is farthest. W = 0 is LRU, W = infinite is Belady's MIN. Each token's experts must be resident
    together, every miss is admitted, pages have one size.

    Args:
        ids: ``[T, K]`` integers, distinct experts of each token in one layer, the highest gate weight first.
        capacity: slots, at least K.
        window: W, tokens after the present one; ``math.inf`` for all.

    Raises:
        ValueError: if the capacity is below K, or W below 0.
    """
    if capacity < ids.shape[1]:
        raise ValueError(f"{capacity} slots cannot hold the {ids.shape[1]} experts of one token")
    if not window >= 0:
        raise ValueError(f"a window of {window} tokens cannot be")
    trace = ids.tolist()
    never = len(trace)
    next_use = [[never] * len(token) for token in trace]
    seen: dict[int, int] = {}
    for t in reversed(range(len(trace))):
        for k, expert in enumerate(trace[t]):
            next_use[t][k] = seen.get(expert, never)
            seen[expert] = t

    resident: dict[int, int] = {}  # expert -> its next use, the least recently used first
    misses = 0
    for t, (token, uses) in enumerate(zip(trace, next_use, strict=True)):
        for expert in token:
            if expert in resident:
                continue
            misses += 1
            if len(resident) == capacity:
                known = {e: use if use <= t + window else never for e, use in resident.items() if e not in token}
                del resident[max(known, key=known.__getitem__)]  # of equals the first, the least recently used
            resident[expert] = never
        for expert, use in zip(reversed(token), reversed(uses), strict=True):
            del resident[expert]  # to come last in the order
            resident[expert] = use
    return misses


def lru_misses(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """Misses of LRU in caches of every capacity at once.

    Whatever its capacity C, a cache holds the C experts touched last, since a token's experts are touched together and
    none of them leaves for another: an expert misses where C or more others were touched after it.

    Args:
        ids: ``[T, K]`` integers, distinct experts of each token in one layer, the highest gate weight first.
        experts: E.

    Returns:
        ``[E + 1]`` float32, by capacity; infinite below K.
    """
    recent: list[int] = []  # the last touched first
    misses = [0] * (experts + 1)  # by how many were touched since: misses in caches of up to so many slots
    for token in ids.tolist():
        for e in token:
            misses[recent.index(e) if e in recent else experts] += 1
        recent = token + [e for e in recent if e not in token]
    by_capacity = torch.tensor(misses, dtype=torch.float64).flip(0).cumsum(0).flip(0).float()
    by_capacity[: ids.shape[1]] = torch.inf
    return by_capacity


def replay(
    logits: torch.Tensor,
    policy: Policy,
    capacity: Sequence[int],
    top_k: int,
    evict: Callable = least_recently_used,
    scores: GateScores = SOFTMAX,
    correction: torch.Tensor | None = None,
) -> Routing:
    """What a policy chooses and misses on one layer's recorded logits, in B caches side by side, cold at first.

    Args:
        logits: ``[T, E]``, as a routing trace has them.
        policy: its knobs ``[B, ...]``, or one row for all.
        capacity: slots of the B caches.
        top_k, evict, scores, correction: as for ``route``.
    """
    caches = len(capacity)
    if policy.knobs is not None and len(policy.knobs) == 1:
        policy = replace(policy, knobs=policy.knobs.repeat(caches, 1))
    state = Residency.empty(torch.tensor(capacity), logits.shape[1])
    return route(logits.float().expand(caches, -1, -1), state, evict, top_k, policy, scores, correction)
