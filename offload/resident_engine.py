"""ResidentEngine: a layer's experts from pages that are all in memory."""

from collections.abc import Callable, Iterable, Sequence
from time import perf_counter

import torch

from cachemoe.kernels.state import Residency, Routing
from cachemoe.offload.carriers import carrier_of
from cachemoe.offload.compute import Compute
from cachemoe.offload.counters import Counters
from cachemoe.offload.link import Link
from cachemoe.offload.plain_torch import plain_torch
from cachemoe.offload.pool import ExpertPool
from cachemoe.offload.residency import least_recently_used
from cachemoe.offload.store import Store, StoreLayout


class ResidentEngine:
    """Every expert in memory: the reference that misses nothing, whatever the routing was told is resident.

    Args:
        store: where the pages are read from, once.
        capacity: slots of each layer in the state that routing sees; with less than E, misses are counted and cost
            nothing.
        device: where the pages are and the experts run.
        advance: called after each page read.

    Attributes:
        state: the ``Residency`` that routing reads and writes, ``[L, ...]``.
        counters: see ``Counters``; on a GPU without ``compute_s``.
    """

    def __init__(
        self,
        store: Store,
        capacity: Sequence[int],
        device: torch.device | str = "cpu",
        advance: Callable[[], None] = lambda: None,
    ):
        layout = store.layout
        self._make(layout, capacity, device)
        with Link([carrier_of(store, self._pool)]) as link:
            pages = ((layer, e) for layer in range(layout.layers) for e in range(layout.experts))
            for _ in link.landed([link.request(*page, frame) for frame, page in enumerate(pages)]):
                advance()

    @classmethod
    def of_pages(
        cls, layout: StoreLayout, pages: Iterable[torch.Tensor], device: torch.device | str = "cpu"
    ) -> "ResidentEngine":
        """An engine of pages that are made one by one, with no store; routing is told that all are resident.

        Args:
            pages: L * E pages, ``[page_bytes]`` uint8 each, expert by expert, layer by layer.
        """
        engine = cls.__new__(cls)
        engine._make(layout, [layout.experts] * layout.layers, device)
        for frame, page in zip(engine._pool.pages, pages, strict=True):
            frame.copy_(page)
        everyone = torch.arange(layout.experts).expand(layout.layers, -1)
        engine.state.slot_of.copy_(everyone)
        engine.state.page_of.copy_(everyone)
        return engine

    @plain_torch()
    def _make(self, layout: StoreLayout, capacity: Sequence[int], device: torch.device | str) -> None:
        self.state, self.evict = Residency.empty(torch.tensor(capacity), layout.experts), least_recently_used
        self.counters = Counters()
        self.page_format, self.formats = layout.page_format, [layout.page_format]
        self._experts_a_layer = layout.experts
        self._pool = ExpertPool(layout.layers * layout.experts, layout.page_format, device)
        self._compute = Compute([self._pool], [layout])

    def caches(self, layer: int) -> Residency:
        """As ``OffloadEngine.caches``."""
        return self.state[layer : layer + 1]

    def miss_cost(self) -> float:
        """As ``OffloadEngine.miss_cost``: no expert is absent."""
        return 0.0

    def holds_all(self, layer: int) -> bool:
        """As ``OffloadEngine.holds_all``."""
        return True

    @torch.no_grad()
    def forward(
        self, layer: int, x: torch.Tensor, routing: Routing, gate_input: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As ``OffloadEngine.forward``."""
        start = perf_counter()
        y = torch.empty_like(x)
        dropped, ids = routing.slots[0] < 0, routing.ids[0] + layer * self._experts_a_layer
        self._compute(x, ids.masked_fill(dropped, -1), routing.weights[0], y)
        counters = self.counters
        if not x.is_cuda:
            counters.compute_s += perf_counter() - start
        drops = 0 if dropped.is_cuda else int(dropped.sum())  # who routes on a GPU drops nothing
        counters.count_call(routing.ids.numel(), drops, int(routing.misses.count.sum()), perf_counter() - start)
        return y
