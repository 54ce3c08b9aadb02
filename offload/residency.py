"""Which resident expert leaves next: eviction policies as functions of the residency's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from cachemoe.kernels.eviction import eviction
from cachemoe.kernels.state import Residency
from cachemoe.offload.errors import InputError


def least_recently_used(last_use):
    """The expert touched longest ago leaves first (LRU, the paper's policy)."""
    return last_use


def least_frequently_used(last_use, uses):
    """The expert with the fewest touches leaves first, the least recent among equals (LFU)."""
    return uses * (1 << 40) + last_use


EVICTION_POLICIES: dict[str, Callable] = {
    "lru": least_recently_used,
    "lfu": least_frequently_used,
}
"""An eviction policy gives each expert an int64 key, from some of ``EVICT_WORDS`` (``kernels/policy.py``); of the
residents that the token does not need the smallest leaves. Arithmetic operators alone: numpy and the kernel share
it."""


def eviction_policy(name: str) -> Callable:
    """The policy of that name.

    Raises:
        InputError: if there is none.
    """
    if not isinstance(name, str) or name not in EVICTION_POLICIES:
        raise InputError(f"unknown eviction policy {name!r}: choose among {', '.join(EVICTION_POLICIES)}")
    return EVICTION_POLICIES[name]


def resized(state: Residency, capacity: torch.Tensor, cheaper: Sequence[int], evict: Callable) -> Residency:
    """The caches with other capacities: of levels that shrink, pages leave by the policy; the rest move up.

    Args:
        state: ``[L, ...]``, or ``[1, ...]`` of one that the layers share.
        capacity: of each cache, int64.
        cheaper: slots of each cheaper level.
        evict: eviction policy.

    Raises:
        ValueError: for less than 1 slot at a level, or more than experts.
    """
    new = Residency.empty(capacity, state.experts, cheaper, state.layers if state.shared else None)
    keys, experts = torch.from_numpy(eviction(evict, state)()), state.experts
    for row, pages in enumerate(state.page_of):
        for (old, stop), (first, end) in zip(state.slots, new.slots, strict=True):
            count = min(end, first + int(capacity[row])) - first if stop == len(pages) else end - first
            stay = pages[old:stop]
            stay = stay[stay >= 0]
            if len(stay) > count:
                worth = keys[row, stay // (experts * state.levels) * experts + stay % experts]
                stay = stay[worth.argsort(descending=True, stable=True)[:count].sort().values]
            new.page_of[row, first : first + len(stay)] = stay
            new.slot_of[row, stay] = torch.arange(first, first + len(stay), device="cpu")
    kept = ("last_use", "uses", "clock", "tokens", "range_sum", "heavy", "expected")
    return replace(new, **{name: getattr(state, name) for name in kept})
