"""Frames: which frame of a pool holds whose page.

Each slot of a cache has a frame in the pool of its level, another one when a staged page came with its own. What
``held`` says decides: the page table that routing sees may be ahead of it, and is made to agree again where a call
failed.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence

import torch

from cachemoe.kernels.state import Residency
from cachemoe.offload.packed import to_device
from cachemoe.offload.pool import ExpertPool
from cachemoe.offload.residency import resized
from cachemoe.offload.store import StoreLayout


class Frames:
    """The frames of each cache's slots, and the pages in them; frames beside them are for staging.

    A cache is of a layer, or of all. Pages are numbered as ``Residency`` numbers those of a cache.

    Ctrl-C may come between any two of Python's instructions. After it, nothing may be moving, ``take_size`` and
    ``settle`` make whole what was under way.

    Args:
        capacity: slots for full precision: of each layer, or one number, of a cache that all layers share.
        staging: frames of each level beside theirs.
        layouts: of the pages of each level, full precision first.
        device: where the frames are.
        cheaper: slots of each cache for each cheaper level.
        surrogates: whether one more level, the cheapest, has all experts of a layer always, without pages: its slots'
            frames are numbers of experts, layer by layer.

    Attributes:
        pools: the frames' memory, a pool a level.
        state: the ``Residency`` that routing reads and writes, ``[L, ...]``, or ``[1, ...]`` of a shared cache.
        held: of each cache the page that is in each slot, complete and valid; -1 for none. Arrays, which C reads too.
        of_slot: of each cache the frame of each slot.
    """

    def __init__(
        self,
        capacity: Sequence[int],
        staging: int,
        layouts: Sequence[StoreLayout],
        device: torch.device | str,
        cheaper: Sequence[int] = (),
        surrogates: bool = False,
    ):
        layers, experts = layouts[0].layers, layouts[0].experts
        self.shared = len(capacity) < layers
        if surrogates and self.shared:
            raise ValueError("surrogates are of a layer, and go with caches of a layer")
        self._always = [experts] if surrogates else []
        levels = [*cheaper, *self._always]
        self.state = Residency.empty(torch.tensor(capacity), experts, levels, layers if self.shared else None)
        self._size = experts * (1 + len(levels))  # pages of a layer
        self._experts, self._staging = experts, staging
        counts = self._counts(capacity, cheaper)
        self.pools = [ExpertPool(n, each.page_format, device) for n, each in zip(counts, layouts, strict=True)]
        self._tables: dict[int, torch.Tensor] = {}  # of layers that have all experts: each one's frame, on the device
        self._resized: tuple | None = None  # what a resize is about to make of state, held and of_slot
        always = range(self._size - experts, self._size) if surrogates else ()
        self.held = [array("q", [*[-1] * sum(cheaper), *always, *[-1] * count]) for count in capacity]
        full = iter(range(sum(capacity)))
        self.of_slot = [
            array("q", [*self._cheap_frames(row, levels), *(next(full) for _ in range(count))])
            for row, count in enumerate(capacity)
        ]
        if surrogates:
            self.settle()

    def row(self, layer: int) -> int:
        """The cache that the layer's pages are in."""
        return 0 if self.shared else layer

    def caches(self, layer: int) -> Residency:
        """``[1, ...]``, what the layer's routing is to see, and to update."""
        return self.state.of_layer(layer) if self.shared else self.state[layer : layer + 1]

    def level(self, slot: int) -> int:
        """Of a slot the level of its page."""
        for level, count in enumerate(self.state.cheaper, 1):
            if slot < count:
                return level
            slot -= count
        return 0

    def page(self, layer: int, expert: int, slot: int) -> int:
        """The number, in its cache, of the page of an expert that a slot can hold."""
        return (layer * self._size if self.shared else 0) + self.level(slot) * self._experts + expert

    def identity(self, layer: int, page: int) -> tuple[int, int, int]:
        """Layer, expert and level of a page in the layer's cache."""
        layer, page = (page // self._size, page % self._size) if self.shared else (layer, page)
        return layer, page % self._experts, page // self._experts

    def pages(self, layer: int, ids: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """``page`` of each of the ids, -1 where the slot is."""
        first = layer * self._size if self.shared else 0
        return torch.where(slots < 0, -1, first + self.state.levels_of(slots) * self._experts + ids)

    def holds(self, layer: int, page: int) -> bool:
        """Whether a slot has the page, by its number in the layer."""
        return (layer * self._size if self.shared else 0) + page in self.held[self.row(layer)]

    def by_page(self, row: int) -> dict[int, int]:
        """The frame of each page that a cache holds."""
        return dict(zip(self.held[row], self.of_slot[row], strict=True))

    def table(self, layer: int) -> torch.Tensor | None:
        """``[E]``, the frame of each of the layer's experts, on a GPU that has all their pages; else None."""
        pages = self.pools[0].pages
        if layer not in self._tables and pages.is_cuda and not self.shared:
            frame_of = self.by_page(layer)
            if all(e in frame_of for e in range(self._experts)):
                table = torch.tensor([frame_of[e] for e in range(self._experts)], device="cpu")
                (self._tables[layer],) = to_device(pages.device, table)
        return self._tables.get(layer)

    def vacate(self, row: int, page: int, slot: int) -> int:
        """Give up what the slot holds, for the page to come; returns the slot's frame."""
        held = self.held[row]
        self._tables.pop(row, None)
        if page in held:  # in another slot than the table says: a call never came
            held[held.index(page)] = -1
        held[slot] = -1
        return self.of_slot[row][slot]

    def missing(self) -> Iterator[tuple[int, int, int]]:
        """Cache, page and slot of each page that ``state`` says is resident and no slot holds.

        Pages that are held stay in their slots, which ``settle`` tells ``state``; those that it does not want are given
        up.
        """
        self._tables.clear()
        for row, held in enumerate(self.held):
            for first, end in self.state.slots:
                end = min(end, len(held))
                wanted = [page for page in self.state.page_of[row, first:end].tolist() if page >= 0]
                here = held[first:end]
                missing = iter([page for page in wanted if page not in here])
                for slot, page in enumerate(here, first):
                    if page not in wanted:
                        held[slot] = -1
                        if (new := next(missing, None)) is not None:
                            yield row, new, slot

    def settle(self, *rows: int) -> None:
        """Make the page table of these caches say what the slots hold; of all, if none is named."""
        for row in rows or range(len(self.held)):
            held = torch.tensor(self.held[row], device="cpu")
            self.state.slot_of[row] = -1
            self.state.slot_of[row, held[held >= 0]] = torch.nonzero(held >= 0).flatten()
            self.state.page_of[row] = -1
            self.state.page_of[row, : len(held)] = held

    def unused(self) -> list[list[int]]:
        """Of each level the frames that no slot has."""
        unused = []
        for pool, (first, end) in zip(self.pools, self.state.slots, strict=False):
            used = {frame for frames in self.of_slot for frame in frames[first:end]}
            unused.append([frame for frame in range(len(pool.pages)) if frame not in used])
        return unused

    def resize(self, capacity: Sequence[int], cheaper: Sequence[int], evict: Callable) -> None:
        """Change the slots of each cache, and the pools with them; nothing may be moving.

        Args:
            capacity, cheaper: as when made.
            evict: who leaves where slots become fewer.

        Raises:
            ValueError: for less than 1 slot at a level, or more than experts.
            InputError: if memory cannot hold the pools.
        """
        self._tables.clear()
        levels = [*cheaper, *self._always]
        state = resized(self.state, torch.tensor(capacity, device="cpu"), levels, evict)
        frame_of = [self.by_page(row) for row in range(len(self.held))]
        begin = sum(levels)
        rows = zip(state.page_of.tolist(), capacity, strict=True)
        held = [array("q", row[: begin + count]) for row, count in rows]
        totals = self._counts(capacity, cheaper)
        for pool, total in zip(self.pools, totals, strict=True):
            if total > len(pool.pages):
                pool.resize(total)
        frames = [
            array("q", [*self._cheap_frames(row, levels), *[0] * (len(held[row]) - begin)]) for row in range(len(held))
        ]
        moves = []
        for level, (total, (first, end)) in enumerate(zip(totals, state.slots, strict=False)):  # those with pages
            places = [(row, slot) for row, pages in enumerate(held) for slot in range(first, min(end, len(pages)))]
            # Pages that stay keep their frames, but for those beyond the new end.
            stay = {(row, slot): frame_of[row][held[row][slot]] for row, slot in places if held[row][slot] >= 0}
            free = iter(sorted(set(range(total)).difference(stay.values())))
            for row, slot in places:
                frame = stay.get((row, slot), total)
                frames[row][slot] = frame if frame < total else next(free)
                if (row, slot) in stay and frame >= total:
                    moves.append((level, frame, frames[row][slot]))
        # From here on the pages of those that leave count for nothing, whatever happens.
        pairs = zip(self.held, held, strict=True)
        self.held = [array("q", [page if page in row else -1 for page in now]) for now, row in pairs]
        for level, before, after in moves:
            pages = self.pools[level].pages
            pages[after] = pages[before]
        self._resized = state, held, frames
        self.take_size()
        for pool, total in zip(self.pools, totals, strict=True):
            if total < len(pool.pages):
                pool.resize(total)

    def take_size(self) -> None:
        """Take what a resize has prepared, if any: done twice, after an interrupt, it is the same."""
        if self._resized is not None:
            self.state, self.held, self.of_slot = self._resized
            self._resized = None

    def _counts(self, capacity: Sequence[int], cheaper: Sequence[int]) -> list[int]:
        """Frames of each level."""
        return [self._staging + n for n in (sum(capacity), *(count * len(capacity) for count in cheaper))]

    @staticmethod
    def _cheap_frames(row: int, cheaper: Sequence[int]) -> list[int]:
        """Of a cache the frames, each in its level's pool, of the slots of the cheaper levels."""
        return [row * count + i for count in cheaper for i in range(count)]
