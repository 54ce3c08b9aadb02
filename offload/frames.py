"""Frames: which frame of the pool holds whose page.

Each slot of a layer has a frame, another one when a staged page came with its own. What ``held`` says decides: the page
table that routing sees may be ahead of it, and is made to agree again where a call failed.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from cachemoe.kernels.state import Residency
from cachemoe.offload.packed import to_device
from cachemoe.offload.pool import ExpertPool
from cachemoe.offload.residency import resized
from cachemoe.offload.store import StoreLayout


class Frames:
    """The frames of each layer's slots, and the pages in them; frames beside them are for staging.

    Ctrl-C may come between any two of Python's instructions. After it, nothing may be moving, ``take_size`` and
    ``settle`` make whole what was under way.

    Args:
        capacity: slots of each layer.
        staging: frames beside theirs.
        layout: of the pages.
        device: where the frames are.

    Attributes:
        pool: the frames' memory.
        state: the ``Residency`` that routing reads and writes, ``[L, ...]``.
        held: of each layer the expert whose page is in each slot, complete and valid; -1 for none.
        of_slot: of each layer the frame of each slot.
    """

    def __init__(self, capacity: Sequence[int], staging: int, layout: StoreLayout, device: torch.device | str):
        self.state = Residency.empty(torch.tensor(capacity), layout.experts)
        self.pool = ExpertPool(sum(capacity) + staging, layout.page_format, device)
        self.held = [[-1] * count for count in capacity]
        frames = iter(range(sum(capacity)))
        self.of_slot = [[next(frames) for _ in range(count)] for count in capacity]
        self._staging = staging
        self._tables: dict[int, torch.Tensor] = {}  # of layers that have all experts: each one's frame, on the device
        self._resized: tuple | None = None  # what a resize is about to make of state, held and of_slot

    def holds(self, layer: int, expert: int) -> bool:
        """Whether a slot has the expert's page."""
        return expert in self.held[layer]

    def table(self, layer: int) -> torch.Tensor | None:
        """``[E]``, the frame of each of the layer's experts, on a GPU that has all their pages; else None."""
        if layer not in self._tables and self.pool.pages.is_cuda:
            held = self.held[layer]
            if len(held) == self.state.slot_of.shape[1] and -1 not in held:
                frames = dict(zip(held, self.of_slot[layer], strict=True))
                table = torch.tensor([frames[e] for e in range(len(held))], device="cpu")
                (self._tables[layer],) = to_device(self.pool.pages.device, table)
        return self._tables.get(layer)

    def vacate(self, layer: int, e: int, slot: int) -> int:
        """Give up what the slot holds, for the expert's page to come; returns the slot's frame."""
        held = self.held[layer]
        self._tables.pop(layer, None)
        if e in held:  # in another slot than the table says: a call never came
            held[held.index(e)] = -1
        held[slot] = -1
        return self.of_slot[layer][slot]

    def missing(self) -> Iterator[tuple[int, int, int]]:
        """Layer, expert and slot of each page that ``state`` says is resident and no slot holds.

        Pages that are held stay in their slots, which ``settle`` tells ``state``; those that it does not want are given
        up.
        """
        self._tables.clear()
        for layer, held in enumerate(self.held):
            wanted = [e for e in self.state.expert_of[layer, : len(held)].tolist() if e >= 0]
            missing = iter([e for e in wanted if e not in held])
            for slot, e in enumerate(held):
                if e not in wanted:
                    held[slot] = -1
                    if (new := next(missing, None)) is not None:
                        yield layer, new, slot

    def settle(self, *layers: int) -> None:
        """Make the page table of these layers say what the slots hold; of all, if none is named."""
        for layer in layers or range(len(self.held)):
            held = torch.tensor(self.held[layer], device="cpu")
            self.state.slot_of[layer] = -1
            self.state.slot_of[layer, held[held >= 0]] = torch.nonzero(held >= 0).flatten()
            self.state.expert_of[layer] = -1
            self.state.expert_of[layer, : len(held)] = held

    def unused(self) -> list[int]:
        """The frames that no slot has."""
        used = {frame for frames in self.of_slot for frame in frames}
        return [frame for frame in range(len(self.pool.pages)) if frame not in used]

    def resize(self, capacity: Sequence[int], evict: Callable) -> None:
        """Change the slots of each layer, and the pool with them; nothing may be moving.

        Args:
            evict: who leaves where slots become fewer.

        Raises:
            ValueError: for a capacity below 1 or above E.
            InputError: if memory cannot hold the pool.
        """
        self._tables.clear()
        state = resized(self.state, torch.tensor(capacity, device="cpu"), evict)
        frame_of = [dict(zip(held, frames, strict=True)) for held, frames in zip(self.held, self.of_slot, strict=True)]
        held = [row[:count] for row, count in zip(state.expert_of.tolist(), capacity, strict=True)]
        total = sum(capacity) + self._staging
        if total > len(self.pool.pages):
            self.pool.resize(total)
        # Pages that stay keep their frames, but for those beyond the new end.
        stay = {frame_of[layer][e] for layer, row in enumerate(held) for e in row if e >= 0}
        free = iter(sorted(set(range(total)).difference(stay)))
        frames = [[frame_of[layer].get(e, total) if e >= 0 else total for e in row] for layer, row in enumerate(held)]
        moves = []
        for layer, row in enumerate(held):
            for slot, e in enumerate(row):
                if frames[layer][slot] >= total:
                    frames[layer][slot] = next(free)
                    if e >= 0:
                        moves.append((frame_of[layer][e], frames[layer][slot]))
        # From here on the pages of those that leave count for nothing, whatever happens.
        self.held = [[e if e in row else -1 for e in old] for old, row in zip(self.held, held, strict=True)]
        for old, new in moves:
            self.pool.pages[new] = self.pool.pages[old]
        self._resized = state, held, frames
        self.take_size()
        if total < len(self.pool.pages):
            self.pool.resize(total)

    def take_size(self) -> None:
        """Take what a resize has prepared, if any: done twice, after an interrupt, it is the same."""
        if self._resized is not None:
            self.state, self.held, self.of_slot = self._resized
            self._resized = None
