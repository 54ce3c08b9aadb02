"""Engines that run a layer's experts from pages: ``OffloadEngine`` fetches missing ones, ``ResidentEngine`` has all.

One call: the routing has chosen experts and slots; misses are asked for, hits are computed while they are read, misses
as they land. Outputs are summed in the routing's order whatever order they land in: the bits do not depend on it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from cachemoe.kernels.experts_cpu import side_by_side
from cachemoe.kernels.formats import PageFormat
from cachemoe.kernels.reference import Routing
from cachemoe.offload.link import Link, Pacing
from cachemoe.offload.pool import ExpertPool
from cachemoe.offload.residency import Residency
from cachemoe.offload.store import ExpertStore


@dataclass
class Counters:
    """Totals since the engine was made or the counters were replaced.

    A selection is one expert chosen by one token. It is a miss if the engine had to ask for its page, a hit otherwise:
    in a call of many tokens an expert misses at most once. ``stall_s`` is time spent waiting for pages with nothing
    left to compute, ``compute_s`` time in the experts' matmuls, ``link_s`` time with pages under way, ``engine_s`` all
    time in the engine.
    """

    calls: int = 0
    selections: int = 0
    hits: int = 0
    misses: int = 0
    pages_read: int = 0
    bytes_read: int = 0
    stall_s: float = 0.0
    compute_s: float = 0.0
    link_s: float = 0.0
    engine_s: float = 0.0

    def count_call(self, selections: int, misses: int, compute_s: float, engine_s: float) -> None:
        """Add one call."""
        self.calls += 1
        self.compute_s += compute_s
        self.selections += selections
        self.hits += selections - misses
        self.misses += misses
        self.engine_s += engine_s


@dataclass(frozen=True)
class Wave:
    """(expert, slot) of experts computed together: ``resident`` have their page, ``loads`` are fetched meanwhile."""

    resident: list[tuple[int, int]]
    loads: list[tuple[int, int]]


def plan_waves(held: Sequence[int], needed: Sequence[int], final: set[int]) -> list[Wave]:
    """Order a call of many tokens so that each needed expert is computed once and ``final`` is what stays.

    Args:
        held: the expert in each slot, -1 for none.
        needed: distinct experts of the call, in order of first use.
        final: experts resident after the call, at most as many as slots; those not held are among ``needed``.

    Returns:
        Waves, to be run one after another. A wave's loads never overwrite a page that the wave computes with. An expert
        is loaded at most once, but for one that must give up its slot where every slot holds an expert that stays.
    """
    here = [(e, slot) for slot, e in enumerate(held) if e in needed]
    passing = [e for e in needed if e not in held and e not in final]
    staying = [e for e in needed if e not in held and e in final]
    free = [slot for slot, e in enumerate(held) if e not in final and e not in needed]
    free_after_first = [slot for slot, e in enumerate(held) if e not in final and e in needed]
    if passing and not free and not free_after_first:
        free_after_first, staying = [len(held) - 1], [*staying, held[-1]]

    waves: list[Wave] = []
    todo = [*passing, *staying]
    while todo or not waves:
        loads = list(zip(todo, free, strict=False))
        todo = todo[len(loads) :]
        kept = {slot for e, slot in loads if e in final}
        free = [slot for slot in free if slot not in kept] + (free_after_first if not waves else [])
        waves.append(Wave(here if not waves else [], loads))
    return waves


class _Call:
    """The inputs and outputs of one call, expert by expert, and the seconds its matmuls took."""

    def __init__(self, x: torch.Tensor, routing: Routing):
        ids, self._weights = routing.ids[0], routing.weights[0]
        self._x = x
        self.compute_s = 0.0
        self._decode = ids.shape[0] == 1
        if self._decode:  # one row an expert: a list is filled faster than a tensor
            self._outputs = [None] * ids.shape[1]
            self._rows = {e: k for k, e in enumerate(ids[0].tolist())}
        else:
            self._outputs = torch.empty(*ids.shape, x.shape[1])
            self._rows = {e: torch.nonzero(ids == e, as_tuple=True) for e in dict.fromkeys(ids.flatten().tolist())}

    @property
    def pending(self) -> list[int]:
        """Experts not computed yet, in order of first use."""
        return list(self._rows)

    def compute(
        self, placed: Sequence[tuple[int, int]], weights: dict[str, torch.Tensor], page_format: PageFormat
    ) -> None:
        """Run pending experts, (expert, slot) each, on the tokens that chose them."""
        start = perf_counter()
        if self._decode and placed:
            y = side_by_side(self._x, weights, torch.tensor([slot for _, slot in placed]), page_format)
            for (e, _), row in zip(placed, y, strict=True):
                self._outputs[self._rows.pop(e)] = row
        else:
            for e, slot in placed:
                rows = self._rows.pop(e)
                self._outputs[rows] = side_by_side(self._x[rows[0]], weights, torch.tensor([slot]), page_format)[0]
        self.compute_s += perf_counter() - start

    def output(self) -> torch.Tensor:
        """``[T, H]``: the sum over k weighted by the gate, in float32, in the routing's order."""
        outputs = torch.cat(self._outputs)[None] if self._decode else self._outputs
        return torch.bmm(self._weights[:, None], outputs)[:, 0].to(self._x.dtype)


class ResidentEngine:
    """Every expert in DRAM: the reference that misses nothing, whatever the routing was told is resident.

    Args:
        store: where the pages are read from, once.
        capacity: slots of each layer in the state that routing sees; with less than E, misses are counted and cost
            nothing.
        advance: called after each page read.

    Attributes:
        state: the ``Residency`` that routing reads and writes, ``[L, ...]``.
        counters: see ``Counters``.
    """

    def __init__(self, store: ExpertStore, capacity: Sequence[int], advance: Callable[[], None] = lambda: None):
        layout = store.layout
        self.state = Residency.empty(torch.tensor(capacity), layout.experts)
        self.counters = Counters()
        self.page_format = layout.page_format
        self._pool = ExpertPool([layout.experts] * layout.layers, layout.page_format)
        pages = [(layer, e) for layer in range(layout.layers) for e in range(layout.experts)]
        requests = [(*page, self._pool.buffer(*page), page) for page in pages]
        with Link(store) as link, link.fetch(requests) as arrivals:
            for _ in arrivals:
                advance()

    @torch.no_grad()
    def forward(self, layer: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """As ``OffloadEngine.forward``."""
        start = perf_counter()
        call = _Call(x, routing)
        call.compute([(e, e) for e in call.pending], self._pool.weights(layer), self.page_format)
        y, misses = call.output(), int(routing.misses.count.sum())
        self.counters.count_call(routing.ids.numel(), misses, call.compute_s, perf_counter() - start)
        return y


class OffloadEngine:
    """A pool of slots over a store: misses are fetched, hits computed meanwhile. Close it, or use it as a context.

    Args:
        store: where every page is.
        capacity: slots of each layer; at least K for the routing that will be used.
        pacing: see ``Link``.

    Attributes:
        state: the ``Residency`` that routing reads and writes, ``[L, ...]``; ``route`` takes ``state[l : l + 1]``.
        counters: see ``Counters``.
    """

    def __init__(self, store: ExpertStore, capacity: Sequence[int], pacing: Pacing | None = None):
        layout = store.layout
        if len(capacity) != layout.layers:
            raise ValueError(f"{len(capacity)} capacities given for the store's {layout.layers} layers")
        self.state = Residency.empty(torch.tensor(capacity), layout.experts)
        self.counters = Counters()
        self.page_format = layout.page_format
        self._pool = ExpertPool(capacity, layout.page_format)
        self._held = [[-1] * count for count in capacity]  # the expert whose page is in each slot, complete and valid
        self._link = Link(store, pacing)

    @torch.no_grad()
    def forward(self, layer: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Run the experts that ``route`` chose for this layer, fetching what is missing.

        Args:
            x: ``[T, H]``, in a dtype that the page format computes in.
            routing: of one cache (B = 1) and these T tokens, with ``state`` as ``route`` left it.

        Returns:
            ``[T, H]`` in x's dtype.

        Raises:
            OSError: if a page could not be read. Its expert is then absent, and the engine can be used on.
        """
        start = perf_counter()
        call = _Call(x, routing)
        if x.shape[0] == 1:
            placed = list(zip(routing.ids.flatten().tolist(), routing.slots.flatten().tolist(), strict=True))
            held = self._held[layer]
            waves = [Wave([p for p in placed if held[p[1]] == p[0]], [p for p in placed if held[p[1]] != p[0]])]
            misses = len(waves[0].loads)
        else:
            final = set(torch.nonzero(self.state.slot_of[layer] >= 0).flatten().tolist())
            waves = plan_waves(self._held[layer], call.pending, final)
            misses = len(set(call.pending) - set(self._held[layer]))
        try:
            for wave in waves:
                self._run(layer, wave, call)
        finally:
            # After many tokens, a failure or Ctrl-C the pages decide which expert is in which slot.
            if x.shape[0] > 1 or call.pending:
                self._settle(layer)
        y = call.output()
        self.counters.count_call(routing.ids.numel(), misses, call.compute_s, perf_counter() - start)
        return y

    def fill(self) -> None:
        """Fetch, at the machine's own speed, every page that ``state`` says is resident and the pool does not hold.

        Pages that the pool holds stay in their slots: which slot an expert has may change, which are resident not.

        Raises:
            OSError: as ``forward``.
        """
        requests = []
        for layer, held in enumerate(self._held):
            wanted = [e for e in self.state.expert_of[layer, : len(held)].tolist() if e >= 0]
            missing = iter([e for e in wanted if e not in held])
            for slot, e in enumerate(held):
                if e not in wanted:
                    held[slot] = -1
                    if (new := next(missing, None)) is not None:
                        requests.append((layer, new, self._pool.buffer(layer, slot), (layer, new, slot)))
        try:
            with self._link.fetch(requests, paced=False) as arrivals:
                for layer, e, slot in arrivals:
                    self._held[layer][slot] = e
        finally:
            for layer in range(len(self._held)):
                self._settle(layer)

    def close(self) -> None:
        """Wait for reads under way and end the reader threads; a second call does nothing."""
        self._link.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _run(self, layer: int, wave: Wave, call: _Call) -> None:
        """Fetch the wave's loads, computing its residents meanwhile and each load as it lands."""
        counters, held, weights = self.counters, self._held[layer], self._pool.weights(layer)
        for _, slot in wave.loads:
            held[slot] = -1
        requests = [(layer, e, self._pool.buffer(layer, slot), (e, slot)) for e, slot in wave.loads]
        asked = landed = perf_counter()
        with self._link.fetch(requests) as arrivals:
            call.compute(wave.resident, weights, self.page_format)
            waiting = perf_counter()
            for e, slot in arrivals:
                held[slot] = e
                landed = perf_counter()
                counters.stall_s += landed - waiting
                counters.pages_read += 1
                counters.bytes_read += self.page_format.page_bytes
                if e in call.pending:  # not so where it only returns to the slot that it had to give up
                    call.compute([(e, slot)], weights, self.page_format)
                waiting = perf_counter()
        counters.link_s += landed - asked

    def _settle(self, layer: int) -> None:
        """Make the page table say what the slots hold."""
        held = torch.tensor(self._held[layer])
        self.state.slot_of[layer] = -1
        self.state.slot_of[layer, held[held >= 0]] = torch.nonzero(held >= 0).flatten()
        self.state.expert_of[layer, : len(held)] = held
