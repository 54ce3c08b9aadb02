"""Which experts are resident, and which leaves next: tensors, and eviction policies as functions of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from cachemoe.offload.errors import InputError


@dataclass
class Residency:
    """State of the caches, one a layer or configuration; ``...`` are leading dimensions, absent or not.

    ``route`` reads and writes a state of leading dimension ``[B]``; ``state[i]`` gives views along the first dimension.

    Args:
        slot_of: ``[..., E]`` int64, the page table: the expert's slot, -1 when absent.
        expert_of: ``[..., C]`` int64, its inverse: the slot's expert, -1 when free. C is the largest capacity.
        capacity: ``[...]`` int64, slots in use. Slots from ``capacity`` on are given to nobody.
        last_use: ``[..., E]`` int64, ``clock`` at the expert's last touch, 0 before it.
        uses: ``[..., E]`` int64, touches.
        clock: ``[...]`` int64, touches of all experts.
        tokens: ``[...]`` int64, tokens routed.
        range_sum: ``[...]`` float64, sum over those tokens of max(logits) - min(logits).
    """

    slot_of: torch.Tensor
    expert_of: torch.Tensor
    capacity: torch.Tensor
    last_use: torch.Tensor
    uses: torch.Tensor
    clock: torch.Tensor
    tokens: torch.Tensor
    range_sum: torch.Tensor

    @classmethod
    def empty(cls, capacity: torch.Tensor, experts: int) -> Residency:
        """Cold caches.

        Args:
            capacity: ``[...]`` int64, slots of each cache.
            experts: E.

        Raises:
            ValueError: if a capacity is below 1 or above E.
        """
        capacity = torch.as_tensor(capacity, dtype=torch.int64, device="cpu")
        low, high = int(capacity.min()), int(capacity.max())
        if low < 1 or high > experts:
            raise ValueError(f"a capacity must lie between 1 and the {experts} experts of a layer, not {low}..{high}")
        shape = tuple(capacity.shape)
        return cls(
            slot_of=torch.full((*shape, experts), -1, dtype=torch.int64, device="cpu"),
            expert_of=torch.full((*shape, high), -1, dtype=torch.int64, device="cpu"),
            capacity=capacity.clone(),
            last_use=torch.zeros((*shape, experts), dtype=torch.int64, device="cpu"),
            uses=torch.zeros((*shape, experts), dtype=torch.int64, device="cpu"),
            clock=torch.zeros(shape, dtype=torch.int64, device="cpu"),
            tokens=torch.zeros(shape, dtype=torch.int64, device="cpu"),
            range_sum=torch.zeros(shape, dtype=torch.float64, device="cpu"),
        )

    def __getitem__(self, index) -> Residency:
        return Residency(*(getattr(self, field.name)[index] for field in fields(self)))

    def clone(self) -> Residency:
        return Residency(*(getattr(self, field.name).clone() for field in fields(self)))

    def to(self, device: torch.device | str) -> Residency:
        """The state on another device; the same tensors where they are there already."""
        return Residency(*(getattr(self, field.name).to(device) for field in fields(self)))

    def with_slots(self, count: int) -> Residency:
        """The state with C = ``count`` slots, ``expert_of`` cut or filled up with free ones; the rest is shared."""
        kept = self.expert_of[..., :count]
        free = kept.new_full((*kept.shape[:-1], count - kept.shape[-1]), -1)
        return replace(self, expert_of=torch.cat((kept, free), -1))

    def resident(self) -> torch.Tensor:
        """``[..., E]`` bool: the experts that have a slot."""
        return self.slot_of >= 0


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
