"""OffloadEngine: a layer's experts from the pages in a pool, those that are missing fetched.

One call: the routing has chosen experts and slots; misses are asked for, then what the next layers will probably want;
hits are computed while pages move, misses as they land. Outputs are summed in the routing's order whatever order pages
land in: the bits do not depend on it.
"""

from collections.abc import Callable, Iterable, Sequence
from math import log1p
from statistics import median
from time import perf_counter

import torch

from cachemoe.kernels import layer_cpu
from cachemoe.kernels.attention_cpu import Attention
from cachemoe.kernels.eviction import eviction
from cachemoe.kernels.layer_cpu import Layer, Router
from cachemoe.kernels.quantized_cpu import weigh
from cachemoe.kernels.state import Residency, Routing
from cachemoe.offload.carriers import carrier_of
from cachemoe.offload.clock import HostClock, StreamClock
from cachemoe.offload.compute import Compute, Surrogates
from cachemoe.offload.counters import Counters
from cachemoe.offload.frames import Frames
from cachemoe.offload.link import Link, Pacing, Transfer
from cachemoe.offload.plain_torch import plain_torch
from cachemoe.offload.prefetch import Prefetcher
from cachemoe.offload.residency import least_recently_used
from cachemoe.offload.staging import Staging
from cachemoe.offload.store import Store
from cachemoe.offload.ticket import Ticket
from cachemoe.offload.timeline import Timeline
from cachemoe.offload.waves import plan_waves

COST_SAMPLES = 9
MOST_TIMES = 10_000  # events kept before they are read, if nobody asks


class OffloadEngine:
    """A pool of slots over a store: misses are fetched, hits computed meanwhile. Close it, or use it as a context.

    Args:
        stores: where every page is, of each level, full precision first: files, for a pool in DRAM; pinned memory, for
            one on a GPU. One store is of one level.
        capacity: slots of each layer for full precision, or one number, of a cache that all layers share; at least K
            for the routing that will be used.
        cheaper: slots of each cache for each cheaper level.
        device: where the pool is and the experts run. ``state`` stays on the CPU, and so does the routing: where the
            model is on a GPU, its router's logits come to the host, which has to know what to fetch.
        pacing: see ``Link``.
        staging: pages that a prefetcher may have ahead at a time; kept as an attribute.
        evict: who leaves for those, and when the pool shrinks; the policy that the routing uses.
        timeline: records what happens when, if given.
        surrogates: of each layer, a level more, the cheapest, that has all experts always.
        admits: whether experts that ran at a cheaper level or gave way to others are fetched when the link is idle, and
            take a slot; needs staging.

    Attributes:
        formats: of the pages of each level.
        is_plain: whether a hit changes nothing but the touches of its layer's cache.
        counters: see ``Counters``; on a GPU, of its times what ``synchronize`` has brought up to date.
    """

    @plain_torch()
    def __init__(
        self,
        stores: Store | Sequence[Store],
        capacity: Sequence[int],
        device: torch.device | str = "cpu",
        pacing: Pacing | None = None,
        staging: int = 0,
        evict: Callable = least_recently_used,
        timeline: Timeline | None = None,
        cheaper: Sequence[int] = (),
        surrogates: Sequence[Surrogates] = (),
        admits: bool = False,
    ):
        stores = stores if isinstance(stores, Sequence) else [stores]
        layouts = [store.layout for store in stores]
        if len(capacity) not in (1, layouts[0].layers):
            raise ValueError(f"{len(capacity)} capacities given for the store's {layouts[0].layers} layers")
        if len(stores) != 1 + len(cheaper):
            raise ValueError(f"{len(stores)} stores given for {1 + len(cheaper)} levels")
        if admits and not staging:
            raise ValueError("an engine that admits experts needs staging")
        self.counters = Counters()
        self.page_format = layouts[0].page_format
        self.formats = [layout.page_format for layout in layouts]
        self.evict, self._timeline, self.staging, self._admits = evict, timeline, staging, admits
        self._layers, self._experts = layouts[0].layers, layouts[0].experts
        self._frames = Frames(capacity, staging, layouts, device, cheaper, bool(surrogates))
        self._pool, pools = self._frames.pools[0], self._frames.pools
        self._compute = Compute(pools, layouts, surrogates)
        self._link = Link([carrier_of(*each) for each in zip(stores, pools, strict=True)], pacing, timeline)
        self._busy_s = 0.0  # of the link, as counted so far
        self._clock = StreamClock(self._pool.pages.device) if self._pool.pages.is_cuda else HostClock()
        self._times: list[tuple] = []  # what and from when to when, not counted yet
        self._tickets: dict[int, Ticket] = {}  # of layers whose experts have been asked for
        self._staging: Staging | None = None
        self.is_plain = not (staging or timeline or self.state.shared or self.state.levels > 1)
        if staging:
            self._staging = Staging(self._link, self._frames.unused(), layouts, self._frames.holds)

    @property
    def state(self) -> Residency:
        """The ``Residency`` that routing reads and writes, a row a cache; another after ``resize``."""
        return self._frames.state

    @state.setter
    def state(self, state: Residency) -> None:
        self._frames.state = state

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
        return self._frames.caches(layer)

    def acquire(self, layer: int, routing: Routing) -> Ticket:
        """Ask for the experts that one token misses; of many tokens, ``forward`` asks for them.

        May be called a layer early. The ticket is good until the layer is routed again, or a call fails.

        Args:
            routing: as for ``forward``.
        """
        if self._link.broken:  # a second Ctrl-C has interrupted what followed the first
            self._recover()
        if layer in self._tickets:
            self._abandon(layer)
        if routing.ids.is_cuda or routing.ids.shape[1] != 1:
            return Ticket(routing)
        ((ids,),), ((slots,),) = routing.ids.tolist(), routing.slots.tolist()
        frames, row = self._frames, self._frames.row(layer)
        held, kept = frames.held[row], [k for k, slot in enumerate(slots) if slot >= 0]
        pages = [frames.page(layer, e, slot) for e, slot in zip(ids, slots, strict=True)]
        self._tickets[layer] = ticket = Ticket(routing, pages, slots, kept, {})
        try:
            missing = [k for k in kept if held[slots[k]] != pages[k]]
            ticket.loads = {self._load(layer, pages[k], slots[k]): k for k in missing}
            if self._staging is not None:
                self._staging.chosen(layer, self._own(pages, kept), self.counters)
        except BaseException:
            self._recover()
            raise
        return ticket

    @torch.no_grad()
    def forward(
        self, layer: int, x: torch.Tensor, routing: Routing | Ticket, gate_input: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the experts that ``route`` chose for this layer, fetching what is missing.

        Args:
            x: ``[T, H]`` contiguous, in a dtype that the page format computes in.
            routing: of one cache (B = 1) and these T tokens, with ``state`` as ``route`` left it, or on the device,
                where ``holds_all``; or the ``Ticket`` that ``acquire`` gave for one.
            gate_input: ``[T, H]``, what the layer's router saw, for prefetchers that want it; None: x.

        Returns:
            ``[T, H]`` in x's dtype.

        Raises:
            Exception: what the store raised, if a page could not be read. Its expert is then absent, and the engine can
                be used on.
            RuntimeError: for a ticket that is good no more.
        """
        start = perf_counter()
        if isinstance(routing, Routing) and routing.ids.shape[:2] == (1, 1) and routing.asked is None:
            if self._computes_at_once(layer, x):
                ((ids,),), ((slots,),) = routing.ids.tolist(), routing.slots.tolist()
                if self._has(layer, ids, slots):
                    return self._at_once(layer, x, slots, *routing.weights[0].tolist(), start)
        ticket = routing if isinstance(routing, Ticket) else self.acquire(layer, routing)
        if ticket.pages is not None and self._tickets.get(layer) is not ticket:
            raise RuntimeError("this ticket is good no more, since another call came between: route the layer again")
        routing = ticket.routing
        try:
            if routing.ids.is_cuda:
                y, misses, drops = self._resident(layer, x, routing), 0, 0
            elif ticket.pages is not None:
                y, misses = self._decode(layer, x, ticket, x if gate_input is None else gate_input)
                drops = len(ticket.pages) - len(ticket.kept)
            else:
                y, misses = self._prefill(layer, x, routing)
                drops = int((routing.slots < 0).sum())
        except BaseException:
            self._recover()
            raise
        self._tickets.pop(layer, None)
        busy, self._busy_s = self._busy_s, self._link.busy_s
        self.counters.link_s += self._busy_s - busy
        if routing.asked is not None:
            self._count_levels(routing)
        self.counters.count_call(routing.ids.numel(), drops, misses, perf_counter() - start)
        if self._admits:
            self._admit(layer, routing)
        return y

    def hit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | None:
        """``place`` and ``forward`` of one token whose experts the pool has, in a fraction of their time on a CPU.

        Args:
            x: ``[1, H]``.
            ids: ``[1, K]`` of experts. weights: ``[1, K]``.

        Returns:
            ``[1, H]``, the same bits as theirs; None where they are to be called, and nothing is done: something is
            missing, or is to be noted or fetched beside.
        """
        if not self._computes_at_once(layer, x):
            return None
        start = perf_counter()
        memory, (chosen,), (given,) = self.state.on_host, ids.tolist(), weights.tolist()
        k = len(chosen)
        if not 0 <= min(chosen) <= max(chosen) < self._experts or len(set(chosen)) < k:
            return None
        slot_of = memory.slot_of[layer]
        order = sorted(range(k), key=lambda i: -given[i])
        chosen, given = [chosen[i] for i in order], [given[i] for i in order]
        slots = [slot_of.item(e) for e in chosen]
        if not self._has(layer, chosen, slots):
            return None
        last_use, uses, clock = memory.last_use[layer], memory.uses[layer], memory.clock.item(layer)
        for i, e in enumerate(chosen):
            last_use[e] = clock + k - i
            uses[e] += 1
        memory.clock[layer] = clock + k
        return self._at_once(layer, x, slots, given, start)

    def layer_in_c(self, layer: int, attention: Attention, router: Router, state: Residency) -> Layer | None:
        """The decoder layer that an MoE layer is in, as ``step`` takes it while it ``is_current``.

        Args:
            attention: of the layer.
            router: that ``fits``.
            state: the layer's, as ``caches`` gives it.

        Returns:
            None where tokens are not computed so.
        """
        x = torch.empty(1, self.page_format.hidden, dtype=attention.dtype, device="cpu")
        if not self.is_plain or not self._compute.takes(x) or not layer_cpu.has_c():
            return None
        frames = self._frames
        memory = frames.held[layer], frames.of_slot[layer], self._pool.weights
        return Layer(attention, router, state, *memory, self.page_format)

    def is_current(self, layer: int, of: Layer) -> bool:
        """Whether the pool is where it was when ``layer_in_c`` gave this."""
        frames = self._frames
        slots = of.held is frames.held[layer] and of.frame_of is frames.of_slot[layer]
        return slots and of.weights is self._pool.weights

    def step(self, layer: int, of: Layer, *arguments) -> torch.Tensor | None:
        """One token's hidden state after a decoder layer: as ``route`` and ``forward``, with what is around them.

        Args:
            of: as ``layer_in_c`` gives it.
            arguments: of ``Layer.step``.

        Returns:
            ``[1, 1, H]``; None where the layer's modules are to be called, and nothing is done but that the token's key
            and value are written.
        """
        if self._link.broken or layer in self._tickets:
            return None
        how, out, normal, routed_s, experts_s = of.step(*arguments)
        if how < 0:
            return None
        if how == 0:
            return out + self.forward(layer, normal[0], of.routing)
        self.counters.compute_s += experts_s
        self.counters.count_call(of.router.top_k, 0, 0, routed_s + experts_s)
        return out

    def _computes_at_once(self, layer: int, x: torch.Tensor) -> bool:
        """Whether a token whose experts are all there is computed in one call, and nothing else is to be done."""
        ready = self.is_plain and not self._link.broken and layer not in self._tickets
        return ready and len(x) == 1 and self._compute.takes(x)

    def _has(self, layer: int, experts: list[int], slots: list[int]) -> bool:
        """Whether each expert is in its slot."""
        held = self._frames.held[layer]
        return min(slots) >= 0 and all(held[slot] == e for e, slot in zip(experts, slots, strict=True))

    def _at_once(self, layer: int, x: torch.Tensor, slots: list[int], gates: list[float], start: float) -> torch.Tensor:
        """The output of a token whose experts are in these slots."""
        of_slot, y = self._frames.of_slot[layer], torch.empty_like(x)
        computing = perf_counter()
        self._compute.token(x, [of_slot[slot] for slot in slots], gates, y)
        end = perf_counter()
        self.counters.compute_s += end - computing
        self.counters.count_call(len(slots), 0, 0, end - start)
        return y

    def fill(self, advance: Callable[[], None] = lambda: None) -> None:
        """Fetch, at the machine's own speed, every page that ``state`` says is resident and the pool does not hold.

        Pages that the pool holds stay in their slots: which slot an expert has may change, which are resident not.

        Args:
            advance: called for each page that has come.

        Raises:
            Exception: as ``forward``.
        """
        for layer in list(self._tickets):
            self._abandon(layer)
        if self._staging is not None:
            self._staging.drop(self.counters)  # or a page that is fetched now would be given a second slot later
        frames, slots = self._frames, {}
        try:
            for row, page, slot in frames.missing():
                layer, expert, level = frames.identity(row, page)
                frame = frames.of_slot[row][slot]
                slots[self._link.request(layer, expert, frame, level, paced=False)] = row, page, slot
            for transfer in self._link.landed(slots):
                row, page, slot = slots[transfer]
                frames.held[row][slot] = page
                advance()
            frames.settle()
        except BaseException:
            self._recover()
            raise
        self._busy_s = self._link.busy_s

    @torch.inference_mode(False)  # and no plain_torch, whose modes Ctrl-C could leave as they are within
    def resize(self, capacity: Sequence[int], cheaper: Sequence[int] = ()) -> None:
        """Change the slots of each layer between two tokens; experts leave by the eviction policy, pages stay.

        Args:
            capacity, cheaper: as when made.

        Raises:
            ValueError: for a capacity below 1 or above E.
            InputError: if memory cannot hold the pool. The engine can be used on, with the capacities that it had or
                with the new ones.
        """
        if self._staging is not None:
            self._staging.drop(self.counters)
        self._recover()  # nothing may move to a frame that moves
        try:
            self._frames.resize(capacity, cheaper, self.evict)
            if self._staging is not None:
                self._staging.reset(self._frames.unused())
        except BaseException:
            self._recover()
            raise

    def miss_cost(self) -> float:
        """The logarithm of how many times as long an absent expert's output takes as a resident's, measured now.

        Of one token and one expert at a time, medians. The first slot of layer 0 gives up its page.
        """
        if 0 in self._tickets:
            self._abandon(0)
        first = self._frames.state.slots[0][0]
        self._frames.held[0][first], frame = -1, self._frames.of_slot[0][first]
        x = torch.linspace(-1, 1, self.page_format.hidden, device="cpu")[None]
        x = x.to(self._pool.pages.device, self.page_format.compute_dtype)
        where, gates, y = torch.tensor([[frame]], device="cpu"), torch.ones(1, 1, device="cpu"), torch.empty_like(x)
        fetches, runs = [], []
        try:
            for i in range(COST_SAMPLES):
                self._pool.wait()
                start = perf_counter()
                for _ in self._link.landed([self._link.request(i % self._layers, i % self._experts, frame)]):
                    self._pool.wait()
                landed = perf_counter()
                self._compute(x, where, gates, y)
                self._pool.wait()
                fetches.append(landed - start)
                runs.append(perf_counter() - landed)
            self._frames.settle(0)
        except BaseException:
            self._recover()
            raise
        self._busy_s = self._link.busy_s
        return log1p(median(fetches) / median(runs))

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
        return self._frames.table(layer) is not None

    def holds(self, layer: int, page: int) -> bool:
        """Whether a slot has the page, by its number in the layer: of full precision an expert."""
        return self._frames.holds(layer, page)

    def holds_good(self, ticket: Ticket) -> bool:
        """Whether ``forward`` takes the ticket still."""
        return ticket.pages is None or ticket in self._tickets.values()

    def _abandon(self, layer: int) -> None:
        """Wait for experts that were asked for and never ran: their pages are moving to frames in use."""
        ticket = self._tickets[layer]
        try:
            held = self._frames.held[self._frames.row(layer)]
            for transfer in self._link.landed(ticket.loads):
                k = ticket.loads[transfer]
                held[ticket.slots[k]] = ticket.pages[k]
                self.counters.count_page(transfer)
        except BaseException:
            self._recover()
            raise
        del self._tickets[layer]

    def _resident(self, layer: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The output of tokens whose experts the GPU finds itself."""
        y = torch.empty_like(x)
        self._timed(layer, x, self._frames.table(layer)[routing.ids[0]], routing.weights[0], y)
        return y

    def _decode(self, layer, x, ticket, gate_input):
        """One token: its output, and how many of its experts missed."""
        pages, slots, kept, loads = ticket.pages, ticket.slots, ticket.kept, ticket.loads
        row = self._frames.row(layer)
        held, frames, missing = self._frames.held[row], self._frames.of_slot[row], list(loads.values())
        if self._staging is not None:
            chosen = self._own(pages, kept)
            self._staging.look_ahead(layer, gate_input, chosen, self._layers, self.counters)
        y, gates = torch.empty_like(x), ticket.routing.weights[0]
        if loads and self.state.levels == 1 and self._compute.takes(x):
            self._decode_in_c(layer, x, ticket, y)
            return y, len(missing)
        where = torch.tensor([[frames[slot] if slot >= 0 else -1 for slot in slots]], device="cpu")
        levels = (0,)
        if self.state.cheaper:
            levels = [self._frames.level(slot) if slot >= 0 else -1 for slot in slots]
        if not loads:
            self._timed(layer, x, where, gates, y, levels=levels)
            return y, 0
        partial = torch.empty(1, len(pages), x.shape[1], dtype=torch.float32, device=x.device)
        pending = torch.ones(1, len(pages), dtype=torch.bool, device="cpu")
        pending[0, missing] = False
        if len(missing) < len(kept):
            self._timed(layer, x, where, gates, y, pending, partial, False, levels=levels)
        left = len(loads)
        for transfer in self._landed(layer, loads):
            k, left = loads[transfer], left - 1
            held[slots[k]] = pages[k]
            pending.zero_()
            pending[0, k] = True
            self._timed(layer, x, where, gates, y, pending, partial, left == 0, levels=(transfer.level,))
        return y, len(missing)

    def _decode_in_c(self, layer, x, ticket, y):
        """As ``_decode`` of a token with misses: into rows of their own those that are there, then each as it lands."""
        slots, kept, loads = ticket.slots, ticket.kept, ticket.loads
        row, (gates,) = self._frames.row(layer), ticket.routing.weights[0].tolist()
        held, frames = self._frames.held[row], self._frames.of_slot[row]
        pairs, order = torch.empty(len(kept), x.shape[1], dtype=torch.float32, device="cpu"), []

        def compute(ks: list[int]) -> None:
            start = self._clock.now()
            self._compute.some(x, [frames[slots[k]] for k in ks], pairs[len(order) :])
            self._note("compute", layer, start)
            order.extend(ks)

        missing = set(loads.values())
        if len(missing) < len(kept):
            compute([k for k in kept if k not in missing])
        for transfer in self._landed(layer, loads):
            k = loads[transfer]
            held[slots[k]] = ticket.pages[k]
            compute([k])
        weigh([gates[k] for k in kept], pairs, [order.index(k) for k in kept], y)

    def _prefill(self, layer, x, routing):
        """Many tokens: their output, and how many of their experts had no page when the call began."""
        row = self._frames.row(layer)
        held, frames = self._frames.held[row], self._frames.of_slot[row]
        pages = self._frames.pages(layer, routing.ids[0], routing.slots[0])
        needed = sorted({page for page in pages.flatten().tolist() if page >= 0})
        misses = len(set(needed).difference(held))
        if not misses and self.is_plain and bool(routing.hits.all()):
            return self._all_there(layer, x, pages, routing.weights[0]), 0
        # Of whom the table says that they stay: but those do not whose page never came.
        here = {page for page in self.state.page_of[row, : len(held)].tolist() if page >= 0}
        final = here.intersection((*held, *needed))
        y, gates = torch.empty_like(x), routing.weights[0]
        partial = torch.empty(*pages.shape, x.shape[1], dtype=torch.float32, device=x.device)
        frame_of = torch.zeros(self.state.slot_of.shape[1] + 1, dtype=torch.int64, device="cpu")
        frame_of[-1] = -1  # of dropped experts

        def compute(placed: list[tuple[int, int]], level: int) -> None:
            if placed:
                numbers, slots = map(list, zip(*placed, strict=True))
                frame_of[numbers] = torch.tensor([frames[slot] for slot in slots], device="cpu")
                here = torch.isin(pages, torch.tensor(numbers, device="cpu"))
                most = int(here.sum()), len(placed)
                where = frame_of[pages].masked_fill(~here, -1)
                self._timed(layer, x, where, gates, y, here, partial, False, most, levels=(level,))

        for level, (first, end) in enumerate(self.state.slots):
            end = min(end, len(held))
            mine = [page for page in needed if self._frames.identity(layer, page)[2] == level]
            stay = {page for page in final if self._frames.identity(layer, page)[2] == level}
            waiting = set(mine)
            for wave in plan_waves(held[first:end], mine, stay):
                loads = {self._load(layer, page, first + slot): (page, first + slot) for page, slot in wave.loads}
                compute([(page, first + slot) for page, slot in wave.resident], level)
                waiting.difference_update(page for page, _ in wave.resident)
                for transfer in self._landed(layer, loads):
                    page, slot = loads[transfer]
                    held[slot] = page
                    if page in waiting:  # not so where it only returns to the slot that it had to give up
                        compute([(page, slot)], level)
                        waiting.remove(page)
        if self._staging is not None:
            self._staging.chosen(layer, self._own(needed, range(len(needed))), self.counters)
        nothing = torch.zeros_like(pages, dtype=torch.bool)
        self._timed(layer, x, frame_of[pages], gates, y, nothing, partial, True, (0, 0))
        self._frames.settle(row)
        return y, misses

    def _all_there(self, layer: int, x: torch.Tensor, pages: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Many tokens whose pages are in slots, in one call."""
        frame_of, y = self._frames.by_page(self._frames.row(layer)) | {-1: -1}, torch.empty_like(x)
        where = torch.tensor([[frame_of[page] for page in line] for line in pages.tolist()], device="cpu")
        most = int((where >= 0).sum()), len(where.unique())
        self._timed(layer, x, where, gates, y, most=most)
        return y

    def _own(self, pages: Sequence[int], kept: Iterable[int]) -> list[int]:
        """The kept ones of a cache's pages, as the layer numbers them."""
        if not self._frames.shared:
            return [pages[k] for k in kept]
        size = self._experts * self.state.levels
        return [pages[k] % size for k in kept]

    def _load(self, layer: int, page: int, slot: int) -> Transfer:
        """See that a page comes to the slot: from staging, or asked for now."""
        row = self._frames.row(layer)
        frame = self._frames.vacate(row, page, slot)
        layer, expert, level = self._frames.identity(layer, page)
        staged = None
        if self._staging is not None:
            staged = self._staging.adopt(layer, level * self._experts + expert, frame, self.counters)
        if staged is None:
            return self._link.request(layer, expert, frame, level)
        self._frames.of_slot[row][slot] = staged.frame
        return staged

    def _count_levels(self, routing: Routing) -> None:
        """Count what ran in another form than full precision, or than the policy asked for."""
        ids, asked, slots = (each[0].numpy() for each in (routing.ids, routing.asked, routing.slots))
        if (slots >= self.state.slots[0][0]).all() and (asked == ids).all():  # a policy that changed nothing
            return
        levels = self.state.levels_of(routing.slots[0]).numpy()
        ran = levels >= 0
        other = ran & (asked % self._experts != ids)
        self.counters.swaps += int(other.sum())
        self.counters.cheap += int((levels > 0).sum())
        self.counters.better += int((ran & ~other & (levels < asked // self._experts)).sum())

    def _admit(self, layer: int, routing: Routing) -> None:
        """Ask the idle link for what the policy would have had, and give slots to what it has brought before."""
        try:
            for later, e, transfer in self._staging.brought(self.counters):
                if later not in self._tickets and not (self._frames.shared and self._tickets):
                    self._give_slot(later, e, transfer)
            if routing.asked is not None and routing.asked.shape[1] == 1:
                wanted = routing.asked[0, 0] % self._experts
                for e, asked in zip(wanted.tolist(), routing.asked[0, 0].tolist(), strict=True):
                    if asked >= 0 and not self._frames.holds(layer, e):
                        self._staging.ask_idle(layer, e)
        except BaseException:
            self._recover()
            raise

    def _give_slot(self, layer: int, e: int, transfer: Transfer) -> None:
        """Let a staged page of full precision take the slot of the expert that leaves by the policy."""
        frames, row = self._frames, self._frames.row(layer)
        state = frames.caches(layer)
        first = state.slots[0][0]
        pages = torch.tensor(frames.held[row][first:], device="cpu")
        experts, size = self._experts, self._experts * state.levels
        keys = torch.from_numpy(eviction(self.evict, state)())[0][pages // size * experts + pages % experts]
        slot = first + int(torch.where(pages < 0, torch.iinfo(torch.int64).min, keys).argmin())
        page = frames.page(layer, e, slot)
        old = frames.held[row][slot]
        frame = frames.vacate(row, page, slot)
        for _ in self._link.landed([self._staging.admit(layer, e, frame, self.counters)]):
            frames.of_slot[row][slot], frames.held[row][slot] = transfer.frame, page
        if old >= 0:
            state.slot_of[0, old] = -1
        state.slot_of[0, page], state.page_of[0, slot] = slot, page
        state.last_use[0, (layer * experts if frames.shared else 0) + e] = state.clock[0]

    def _landed(self, layer: int, loads: dict):
        """The transfers as they land."""
        waiting = self._clock.now()
        for transfer in self._link.landed(loads):
            self._note("stall", layer, waiting, expert=transfer.expert)
            self.counters.count_page(transfer)
            yield transfer
            waiting = self._clock.now()

    def _timed(self, layer: int, *arguments, **more) -> None:
        """Compute, and note the time."""
        start = self._clock.now()
        self._compute(*arguments, **more)
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
            self._tickets.clear()
            self._frames.take_size()
            self._link.abandon()
            if self._staging is not None:
                self._staging.reset(self._frames.unused())
            self._frames.settle()
        except BaseException:
            self._link.broken = True
            raise
