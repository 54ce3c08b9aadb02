"""Engines that run a layer's experts from pages: ``OffloadEngine`` fetches missing ones, ``ResidentEngine`` has all.

One call: the routing has chosen experts and slots; misses are asked for, then what the next layers will probably want;
hits are computed while pages move, misses as they land. Outputs are summed in the routing's order whatever order pages
land in: the bits do not depend on it.
"""

from collections.abc import Callable, Iterable, Sequence
from time import perf_counter

import torch

from cachemoe.kernels import experts_cpu
from cachemoe.kernels.experts import experts
from cachemoe.kernels.state import Residency, Routing
from cachemoe.offload.carriers import CopyCarrier, ReadCarrier
from cachemoe.offload.clock import HostClock, StreamClock
from cachemoe.offload.counters import Counters
from cachemoe.offload.link import Link, Pacing, Transfer
from cachemoe.offload.packed import to_device
from cachemoe.offload.plain_torch import plain_torch
from cachemoe.offload.pool import ExpertPool
from cachemoe.offload.prefetch import Prefetcher
from cachemoe.offload.residency import least_recently_used, resized
from cachemoe.offload.staging import Staging
from cachemoe.offload.store import Store, StoreLayout
from cachemoe.offload.timeline import Timeline
from cachemoe.offload.waves import plan_waves

MOST_TIMES = 10_000  # events kept before they are read, if nobody asks


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
        with Link(_carrier(store, self._pool)) as link:
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
        engine.state.expert_of.copy_(everyone)
        return engine

    @plain_torch()
    def _make(self, layout: StoreLayout, capacity: Sequence[int], device: torch.device | str) -> None:
        self.state = Residency.empty(torch.tensor(capacity), layout.experts)
        self.counters = Counters()
        self.page_format = layout.page_format
        self._experts_a_layer = layout.experts
        self._pool = ExpertPool(layout.layers * layout.experts, layout.page_format, device)
        self._compute = _Compute(self._pool, layout)

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
        self._compute(x, routing.ids[0] + layer * self._experts_a_layer, routing.weights[0], y)
        counters = self.counters
        if not x.is_cuda:
            counters.compute_s += perf_counter() - start
        counters.count_call(routing.ids.numel(), int(routing.misses.count.sum()), perf_counter() - start)
        return y


class OffloadEngine:
    """A pool of slots over a store: misses are fetched, hits computed meanwhile. Close it, or use it as a context.

    Args:
        store: where every page is: a file, for a pool in DRAM; pinned memory, for one on a GPU.
        capacity: slots of each layer; at least K for the routing that will be used.
        device: where the pool is and the experts run. ``state`` stays on the CPU, and so does the routing: where the
            model is on a GPU, its router's logits come to the host, which has to know what to fetch.
        pacing: see ``Link``.
        staging: pages that a prefetcher may have ahead at a time.
        evict: who leaves for those, and when the pool shrinks; the policy that the routing uses.
        timeline: records what happens when, if given.

    Attributes:
        state: the ``Residency`` that routing reads and writes, ``[L, ...]``.
        counters: see ``Counters``; on a GPU, of its times what ``synchronize`` has brought up to date.
    """

    @plain_torch()
    def __init__(
        self,
        store: Store,
        capacity: Sequence[int],
        device: torch.device | str = "cpu",
        pacing: Pacing | None = None,
        staging: int = 0,
        evict: Callable = least_recently_used,
        timeline: Timeline | None = None,
    ):
        layout = store.layout
        if len(capacity) != layout.layers:
            raise ValueError(f"{len(capacity)} capacities given for the store's {layout.layers} layers")
        self.state = Residency.empty(torch.tensor(capacity), layout.experts)
        self.counters = Counters()
        self.page_format = layout.page_format
        self._evict, self._timeline = evict, timeline
        self._pool = ExpertPool(sum(capacity) + staging, layout.page_format, device)
        self._compute = _Compute(self._pool, layout)
        frames = iter(range(sum(capacity)))
        self._frames = [[next(frames) for _ in range(count)] for count in capacity]  # of each slot
        self._held = [[-1] * count for count in capacity]  # the expert whose page is in each slot, complete and valid
        self._tables: dict[int, torch.Tensor] = {}  # of layers that have all experts: each one's frame, on the device
        self._link = Link(_carrier(store, self._pool), pacing, timeline)
        self._busy_s = 0.0  # of the link, as counted so far
        self._clock = StreamClock(self._pool.pages.device) if self._pool.pages.is_cuda else HostClock()
        self._times: list[tuple] = []  # what and from when to when, not counted yet
        self._staging_frames = staging
        ahead = range(sum(capacity), sum(capacity) + staging)
        self._resized: tuple | None = None  # what a resize is about to make of state, held and frames
        self._staging = Staging(self._link, ahead, layout.page_format.page_bytes, self._holds) if staging else None

    @property
    def prefetcher(self) -> Prefetcher | None:
        """What predicts the next layers' experts; None for no prefetch. To be set between tokens.

        Raises:
            ValueError: if it is set and there is no staging to prefetch to.
        """
        return self._staging.prefetcher if self._staging else None

    @prefetcher.setter
    def prefetcher(self, prefetcher: Prefetcher | None) -> None:
        if self._staging is not None:
            self._staging.drop(self.counters)
            self._staging.prefetcher = prefetcher
        elif prefetcher is not None:
            raise ValueError("a prefetcher needs an engine made with staging")

    def caches(self, layer: int) -> Residency:
        """``[1, ...]``, what the layer's routing is to see, and to update."""
        return self.state[layer : layer + 1]

    @torch.no_grad()
    def forward(
        self, layer: int, x: torch.Tensor, routing: Routing, gate_input: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the experts that ``route`` chose for this layer, fetching what is missing.

        Args:
            x: ``[T, H]`` contiguous, in a dtype that the page format computes in.
            routing: of one cache (B = 1) and these T tokens, with ``state`` as ``route`` left it; or on the device,
                where ``holds_all``.
            gate_input: ``[T, H]``, what the layer's router saw, for prefetchers that want it; None: x.

        Returns:
            ``[T, H]`` in x's dtype.

        Raises:
            Exception: what the store raised, if a page could not be read. Its expert is then absent, and the engine can
                be used on.
        """
        start = perf_counter()
        if self._link.broken:  # a second Ctrl-C has interrupted what followed the first
            self._recover()
        try:
            if routing.ids.is_cuda:
                y, misses = self._resident(layer, x, routing), 0
            elif x.shape[0] == 1:
                y, misses = self._decode(layer, x, routing, x if gate_input is None else gate_input)
            else:
                y, misses = self._prefill(layer, x, routing)
        except BaseException:
            self._recover()
            raise
        busy, self._busy_s = self._busy_s, self._link.busy_s
        self.counters.link_s += self._busy_s - busy
        self.counters.count_call(routing.ids.numel(), misses, perf_counter() - start)
        return y

    def fill(self) -> None:
        """Fetch, at the machine's own speed, every page that ``state`` says is resident and the pool does not hold.

        Pages that the pool holds stay in their slots: which slot an expert has may change, which are resident not.

        Raises:
            Exception: as ``forward``.
        """
        slot_of = {}
        self._tables.clear()
        try:
            for layer, held in enumerate(self._held):
                wanted = [e for e in self.state.expert_of[layer, : len(held)].tolist() if e >= 0]
                missing = iter([e for e in wanted if e not in held])
                for slot, e in enumerate(held):
                    if e not in wanted:
                        held[slot] = -1
                        if (new := next(missing, None)) is not None:
                            slot_of[self._link.request(layer, new, self._frames[layer][slot], paced=False)] = slot
            for transfer in self._link.landed(slot_of):
                self._held[transfer.layer][slot_of[transfer]] = transfer.expert
            for layer in range(len(self._held)):
                self._settle(layer)
        except BaseException:
            self._recover()
            raise
        self._busy_s = self._link.busy_s

    @torch.inference_mode(False)  # and no plain_torch, whose modes Ctrl-C could leave as they are within
    def resize(self, capacity: Sequence[int]) -> None:
        """Change the slots of each layer between two tokens; experts leave by the eviction policy, pages stay.

        Raises:
            ValueError: for a capacity below 1 or above E.
            InputError: if memory cannot hold the pool. The engine can be used on, with the capacities that it had or
                with the new ones.
        """
        if self._staging is not None:
            self._staging.drop(self.counters)
        self._recover()  # nothing may move to a frame that moves
        self._tables.clear()
        state = resized(self.state, torch.tensor(capacity, device="cpu"), self._evict)
        frame_of = [dict(zip(held, frames, strict=True)) for held, frames in zip(self._held, self._frames, strict=True)]
        held = [row[:count] for row, count in zip(state.expert_of.tolist(), capacity, strict=True)]
        total = sum(capacity) + self._staging_frames
        if total > len(self._pool.pages):
            self._pool.resize(total)
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
        try:
            # From here on the pages of those that leave count for nothing, whatever happens.
            self._held = [[e if e in row else -1 for e in old] for old, row in zip(self._held, held, strict=True)]
            for old, new in moves:
                self._pool.pages[new] = self._pool.pages[old]
            self._resized = state, held, frames
            self._take_size()
            if total < len(self._pool.pages):
                self._pool.resize(total)
            if self._staging is not None:
                self._staging.reset(free)
        except BaseException:
            self._recover()
            raise

    def synchronize(self) -> None:
        """Wait for what is queued on the device, and bring the counters' times up to date."""
        times, self._times = self._times, []
        for name, start, end in times:
            setattr(self.counters, name, getattr(self.counters, name) + self._clock.seconds(start, end))

    def close(self) -> None:
        """Wait for pages under way and end the link's threads; a second call does nothing."""
        self._link.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def holds_all(self, layer: int) -> bool:
        """Whether a GPU has the pages of all the layer's experts, and so finds each without the host's help."""
        if layer not in self._tables and self._pool.pages.is_cuda:
            held = self._held[layer]
            if len(held) == self.state.slot_of.shape[1] and -1 not in held:
                frames = dict(zip(held, self._frames[layer], strict=True))
                table = torch.tensor([frames[e] for e in range(len(held))], device="cpu")
                (self._tables[layer],) = to_device(self._pool.pages.device, table)
        return layer in self._tables

    def _resident(self, layer: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The output of tokens whose experts the GPU finds itself."""
        y = torch.empty_like(x)
        self._timed(layer, x, self._tables[layer][routing.ids[0]], routing.weights[0], y)
        return y

    def _holds(self, layer: int, expert: int) -> bool:
        return expert in self._held[layer]

    def _decode(self, layer, x, routing, gate_input):
        """One token: its output, and how many of its experts missed."""
        ((ids,),), ((slots,),) = routing.ids.tolist(), routing.slots.tolist()
        held, frames = self._held[layer], self._frames[layer]
        missing = [k for k, (e, slot) in enumerate(zip(ids, slots, strict=True)) if held[slot] != e]
        loads = {self._load(layer, ids[k], slots[k]): k for k in missing}
        if self._staging is not None:
            self._staging.chosen(layer, ids, self.counters)
            self._staging.look_ahead(layer, gate_input, ids, len(self._held), self.counters)
        y, gates = torch.empty_like(x), routing.weights[0]
        where = torch.tensor([[frames[slot] for slot in slots]], device="cpu")
        if not loads:
            self._timed(layer, x, where, gates, y)
            return y, 0
        partial = torch.empty(1, len(ids), x.shape[1], dtype=torch.float32, device=x.device)
        pending = torch.ones(1, len(ids), dtype=torch.bool, device="cpu")
        pending[0, missing] = False
        if len(missing) < len(ids):
            self._timed(layer, x, where, gates, y, pending, partial, False)
        left = len(loads)
        for transfer in self._landed(layer, loads):
            k, left = loads[transfer], left - 1
            held[slots[k]] = ids[k]
            pending.zero_()
            pending[0, k] = True
            self._timed(layer, x, where, gates, y, pending, partial, left == 0)
        return y, len(missing)

    def _prefill(self, layer, x, routing):
        """Many tokens: their output, and how many of their experts had no page when the call began."""
        ids, held, frames = routing.ids[0], self._held[layer], self._frames[layer]
        needed = list(dict.fromkeys(ids.flatten().tolist()))
        misses = len(set(needed).difference(held))
        # Of whom the table says that they stay: but those do not whose page never came.
        here = {e for e in self.state.expert_of[layer, : len(held)].tolist() if e >= 0}
        final = here.intersection((*held, *needed))
        y, gates = torch.empty_like(x), routing.weights[0]
        partial = torch.empty(*ids.shape, x.shape[1], dtype=torch.float32, device=x.device)
        frame_of = torch.zeros(self.state.slot_of.shape[1], dtype=torch.int64, device="cpu")

        def compute(placed: list[tuple[int, int]]) -> None:
            if placed:
                experts, slots = map(list, zip(*placed, strict=True))
                frame_of[experts] = torch.tensor([frames[slot] for slot in slots], device="cpu")
                here = torch.isin(ids, torch.tensor(experts, device="cpu"))
                most = int(here.sum()), len(placed)
                self._timed(layer, x, frame_of[ids], gates, y, here, partial, False, most)

        waiting = set(needed)
        for wave in plan_waves(held, needed, final):
            loads = {self._load(layer, *place): place for place in wave.loads}
            compute(wave.resident)
            waiting.difference_update(e for e, _ in wave.resident)
            for transfer in self._landed(layer, loads):
                e, slot = loads[transfer]
                held[slot] = e
                if e in waiting:  # not so where it only returns to the slot that it had to give up
                    compute([(e, slot)])
                    waiting.remove(e)
        if self._staging is not None:
            self._staging.chosen(layer, needed, self.counters)
        nothing = torch.zeros_like(ids, dtype=torch.bool)
        self._timed(layer, x, frame_of[ids], gates, y, nothing, partial, True, (0, 0))
        self._settle(layer)
        return y, misses

    def _load(self, layer: int, e: int, slot: int) -> Transfer:
        """See that the expert's page comes to the slot: from staging, or asked for now."""
        held, frames = self._held[layer], self._frames[layer]
        self._tables.pop(layer, None)
        if e in held:  # in another slot than the table says: a call never came
            held[held.index(e)] = -1
        held[slot] = -1
        staged = self._staging.adopt(layer, e, frames[slot], self.counters) if self._staging else None
        if staged is None:
            return self._link.request(layer, e, frames[slot])
        frames[slot] = staged.frame
        return staged

    def _landed(self, layer: int, loads: dict):
        """The transfers as they land."""
        waiting = self._clock.now()
        for transfer in self._link.landed(loads):
            self._note("stall", layer, waiting, expert=transfer.expert)
            self.counters.count_page(self.page_format.page_bytes)
            yield transfer
            waiting = self._clock.now()

    def _timed(self, layer: int, *arguments) -> None:
        """Compute, and note the time."""
        start = self._clock.now()
        self._compute(*arguments)
        self._note("compute", layer, start)

    def _note(self, what: str, layer: int, start, **details) -> None:
        """Count the time from ``start`` to now as stalled or computing."""
        end = self._clock.now()
        self._times.append((f"{what}_s", start, end))
        if self._timeline is not None:
            self._clock.record(self._timeline, what, f"layer {layer}", start, end, layer=layer, **details)
        if not self._clock.deferred or len(self._times) > MOST_TIMES:
            self.synchronize()

    def _recover(self) -> None:
        """After a failure or Ctrl-C, wherever it came: let nothing move, and let the pages decide who is where."""
        try:
            self._take_size()
            self._link.abandon()
            if self._staging is not None:
                used = {frame for frames in self._frames for frame in frames}
                self._staging.reset(frame for frame in range(len(self._pool.pages)) if frame not in used)
            for layer in range(len(self._held)):
                self._settle(layer)
        except BaseException:
            self._link.broken = True
            raise

    def _take_size(self) -> None:
        """Take what a resize has prepared, if any: done twice, after an interrupt, it is the same."""
        if self._resized is not None:
            self.state, self._held, self._frames = self._resized
            self._resized = None

    def _settle(self, layer: int) -> None:
        """Make the page table say what the slots hold."""
        held = torch.tensor(self._held[layer], device="cpu")
        self.state.slot_of[layer] = -1
        self.state.slot_of[layer, held[held >= 0]] = torch.nonzero(held >= 0).flatten()
        self.state.expert_of[layer] = -1
        self.state.expert_of[layer, : len(held)] = held


class _Compute:
    """``cachemoe.kernels.experts.experts`` over the frames of a pool."""

    def __init__(self, pool: ExpertPool, layout: StoreLayout):
        self._pool, self._format, self._experts = pool, layout.page_format, layout.experts

    def __call__(self, x, frames, gates, out, pending=None, partial=None, finish=True, most=None) -> None:
        if not x.is_cuda:  # without the checks: all of it is the engine's own
            experts_cpu.experts(x, frames, gates, self._pool.weights, self._format, out, pending, partial, finish)
            return
        frames, gates, *some = to_device(x.device, frames, gates, *([] if pending is None else [pending]))
        pending = some[0] if some else None
        weights, among = self._pool.weights, self._experts
        experts(x, frames, gates, weights, self._format, out, pending, partial, finish, among, most)


def _carrier(store: Store, pool: ExpertPool):
    return CopyCarrier(store, pool) if pool.pages.is_cuda else ReadCarrier(store, pool)
