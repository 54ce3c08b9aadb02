"""Which resident expert leaves next: eviction policies as functions of the residency's tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from cachemoe.kernels.state import Residency
from cachemoe.offload.errors import InputError


def least_recently_used(last_use, uses):
    """The expert touched longest ago leaves first (LRU, the paper's policy)."""
    return last_use


def least_frequently_used(last_use, uses):
    """The expert with the fewest touches leaves first, the least recent among equals (LFU)."""
    return uses * (1 << 40) + last_use


EVICTION_POLICIES: dict[str, Callable] = {
    "lru": least_recently_used,
    "lfu": least_frequently_used,
}
"""An eviction policy gives each expert a key from its ``last_use`` and ``uses``, both int64; among residents that the
token does not need, the smallest leaves. Arithmetic operators alone: torch, numpy and the kernel share a definition."""


def eviction_policy(name: str) -> Callable:
    """The policy of that name.

    Raises:
        InputError: if there is none.
    """
    if not isinstance(name, str) or name not in EVICTION_POLICIES:
        raise InputError(f"unknown eviction policy {name!r}: choose among {', '.join(EVICTION_POLICIES)}")
    return EVICTION_POLICIES[name]


def resized(state: Residency, capacity: torch.Tensor, evict: Callable) -> Residency:
    """The caches with other capacities: of those that shrink, experts leave by the policy; the rest move up.

    Args:
        state: ``[L, ...]``.
        capacity: ``[L]`` int64.
        evict: eviction policy.

    Raises:
        ValueError: if a capacity is below 1 or above E.
    """
    new = Residency.empty(capacity, state.slot_of.shape[-1])
    keys = evict(state.last_use, state.uses)
    for layer, count in enumerate(capacity.tolist()):
        slots = state.expert_of[layer]
        stay = slots[slots >= 0]
        if len(stay) > count:
            stay = stay[keys[layer, stay].argsort(descending=True, stable=True)[:count].sort().values]
        new.expert_of[layer, : len(stay)] = stay
        new.slot_of[layer, stay] = torch.arange(len(stay), device="cpu")
    return replace(new, **{name: getattr(state, name) for name in ("last_use", "uses", "clock", "tokens", "range_sum")})
