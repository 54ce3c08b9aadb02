"""Cache policies on a recorded trace of expert selections, without moving a page."""

import torch


def belady_misses(ids: torch.Tensor, capacity: int) -> int:
    """Misses of the optimal eviction with hindsight (Belady's MIN): the expert whose next use is farthest leaves.

    Each token's experts must be resident together, every miss is admitted, pages have one size. Optimal for this
    trace only: a router that sees the cache changes the trace and may miss less.

    Args:
        ids: ``[T, K]`` integers, distinct experts of each token in one layer.
        capacity: slots, at least K.

    Raises:
        ValueError: if capacity is below K.
    """
    if capacity < ids.shape[1]:
        raise ValueError(f"{capacity} slots cannot hold the {ids.shape[1]} experts of one token")
    trace = ids.tolist()
    never = len(trace)
    next_use = [[never] * len(token) for token in trace]
    seen: dict[int, int] = {}
    for t in reversed(range(len(trace))):
        for k, expert in enumerate(trace[t]):
            next_use[t][k] = seen.get(expert, never)
            seen[expert] = t

    resident: dict[int, int] = {}  # expert -> its next use
    misses = 0
    for token, uses in zip(trace, next_use, strict=True):
        for expert in token:
            if expert in resident:
                continue
            misses += 1
            if len(resident) == capacity:
                del resident[max((e for e in resident if e not in token), key=resident.__getitem__)]
            resident[expert] = never
        resident.update(zip(token, uses, strict=True))
    return misses
