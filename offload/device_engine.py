"""The device-driven engine: residency, misses and fetches stay on the device, so that a CUDA graph can hold a step.

``route`` updates the residency and names victims, ``fetch`` copies the missing pages from pinned memory, ``experts``
computes: three kernels a layer, or two where the experts read missing pages through, and the host waits for none.
"""

from collections.abc import Sequence

import torch

from cachemoe.kernels.experts import experts, experts_read_through
from cachemoe.kernels.fetch import fetch
from cachemoe.kernels.state import Residency, Routing
from cachemoe.offload.counters import Counters
from cachemoe.offload.pinned import PinnedStore
from cachemoe.offload.pool import ExpertPool


class DeviceEngine:
    """A pool of slots over pinned memory, driven by the device itself; one token at a time.

    On CPU tensors it does the same with the CPU's implementations of the kernels.

    Args:
        store: where every page is, in memory that the device can read.
        capacity: slots of each layer; at least K, which on a GPU nobody checks.
        top_k: K.
        device: where the pool and the residency are.
        read_through: whether the experts read missing pages from the store while they compute, or ``fetch`` copies them
            before.

    Attributes:
        state: the ``Residency``, ``[L, ...]``, on the device.
    """

    def __init__(
        self,
        store: PinnedStore,
        capacity: Sequence[int],
        top_k: int,
        device: torch.device | str = "cpu",
        read_through: bool = False,
    ):
        layout = store.layout
        if len(capacity) != layout.layers:
            raise ValueError(f"{len(capacity)} capacities given for the store's {layout.layers} layers")
        self.page_format, self.formats = layout.page_format, [layout.page_format]
        self.state = Residency.empty(torch.tensor(capacity), layout.experts).to(device)
        self._read_through, self._top_k = read_through, top_k
        self._pool = ExpertPool(sum(capacity), layout.page_format, device)
        self._slots = self._pool.pages.split(list(capacity))  # of each layer
        self._weights = [layout.page_format.views(slots) for slots in self._slots]
        self._stored = store.memory.split(layout.experts)  # of each layer
        # Of all layers side by side, so that one addition a token counts every layer's misses.
        self._routing = Routing.empty(layout.layers, 1, top_k, device)
        self._missed, self._dropped = torch.zeros(2, layout.layers, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(1, dtype=torch.int64, device=device)
        # Where the host can read them at any time: the last token's copies.
        pinned = {"dtype": torch.int64, "pin_memory": self._pool.pages.is_cuda}
        self._missed_seen, self._tokens_seen = torch.zeros(layout.layers, **pinned), torch.zeros(1, **pinned)
        self._dropped_seen = torch.zeros(layout.layers, **pinned)

    def caches(self, layer: int) -> Residency:
        """``[1, ...]``, what the layer's routing is to see, and to update."""
        return self.state[layer : layer + 1]

    def routing(self, layer: int) -> Routing:
        """Where the layer's routing is to go: memory that stays the same from token to token."""
        return self._routing[layer : layer + 1]

    @torch.no_grad()
    def forward(
        self, layer: int, x: torch.Tensor, routing: Routing, gate_input: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Fetch what ``route`` found missing and run the experts; queued, not waited for.

        Args:
            x: ``[1, H]``.
            routing: of one token, ``self.routing(layer)`` filled by ``route``. Layers come in order.
            gate_input: not needed here.

        Returns:
            ``[1, H]`` in x's dtype.

        Raises:
            ValueError: for more than one token.
        """
        if x.shape[0] != 1:
            raise ValueError(
                f"the device-driven engine runs one token at a time, not {x.shape[0]}: decode them in turn"
            )
        y = self.compute(layer, x, routing)
        if layer == len(self._slots) - 1:
            self._missed += self._routing.misses.count
            self._dropped += (self._routing.slots < 0).sum((1, 2))
            self._tokens += 1
            self._missed_seen.copy_(self._missed, non_blocking=True)
            self._dropped_seen.copy_(self._dropped, non_blocking=True)
            self._tokens_seen.copy_(self._tokens, non_blocking=True)
        return y

    def compute(self, layer: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """``forward`` without its check and its counters, from a routing anywhere: what a layer costs by itself."""
        slots, gates, misses = routing.slots[0], routing.weights[0], routing.misses
        pool, stored = self._slots[layer], self._stored[layer]
        if self._read_through:
            pages = torch.where(routing.hits[0] | (slots < 0), -1, routing.ids[0])
            return experts_read_through(x, slots, gates, pool, stored, pages, self.page_format)
        fetch(stored, pool, misses.pages[0], misses.slots[0], misses.count)
        return experts(x, slots, gates, self._weights[layer], self.page_format)

    @property
    def counters(self) -> Counters:
        """Of the tokens that have ended, without waiting: one that is under way may be in it in part."""
        missed, calls = int(self._missed_seen.sum()), int(self._tokens_seen) * len(self._slots)
        drops = int(self._dropped_seen.sum())
        selections = calls * self._top_k - drops
        counters = Counters(calls, selections, drops, hits=selections - missed, misses=missed)
        counters.pages_read, counters.bytes_read = missed, missed * self.page_format.page_bytes
        return counters

    def reset_counters(self) -> None:
        """Count from here on; between two tokens that the device has ended."""
        for total in (
            *(self._missed, self._dropped, self._tokens),
            *(self._missed_seen, self._dropped_seen, self._tokens_seen),
        ):
            total.zero_()

    def fill(self) -> None:
        """Copy every page that ``state`` says is resident to its slot. Waits for the device."""
        for slots, stored, experts_held in zip(self._slots, self._stored, self.state.page_of.tolist(), strict=True):
            for slot, e in enumerate(experts_held[: len(slots)]):
                if e >= 0:
                    slots[slot].copy_(stored[e])
