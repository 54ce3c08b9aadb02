"""A model's experts, served from a pool of pages: what ``model.cachemoe`` is."""

import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import exp
from pathlib import Path
from threading import Lock

import torch

from cachemoe.kernels import route_cpu
from cachemoe.kernels.layer_cpu import Router
from cachemoe.kernels.route_batch import place_batch
from cachemoe.kernels.state import Residency, Routing
from cachemoe.moe.budgets import adaptive_slots
from cachemoe.moe.calibration import Calibration
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.chooser import Chooser
from cachemoe.moe.contents import Contents
from cachemoe.moe.decode_step import Step
from cachemoe.moe.decode_threads import DecodeThreads
from cachemoe.moe.dense import DenseRounding
from cachemoe.moe.doors import PooledParameter, close_doors, refuse_transforms, uncopiable
from cachemoe.moe.in_memory import ModelExperts
from cachemoe.moe.layers import check_count, gates_of, moe_layers, probe, router_marks, routing_rules
from cachemoe.moe.model_calls import BatchShape, ModelCalls
from cachemoe.moe.pack import rounds
from cachemoe.moe.policies.rule import EXACT, PRECISION_CHANGED
from cachemoe.moe.routers import RoutingRule
from cachemoe.moe.saved_residency import save_residency
from cachemoe.moe.sizes import LevelBytes, size_text, slots_of, split_pool
from cachemoe.moe.sources import Ahead, Forecast, Foretold, gates_ahead
from cachemoe.moe.strategies import Original, Strategy, checked
from cachemoe.moe.swap import Swap
from cachemoe.moe.whole_layers import WholeLayer, router_of
from cachemoe.offload.counters import Counters
from cachemoe.offload.engine import OffloadEngine
from cachemoe.offload.errors import InputError
from cachemoe.offload.packed import to_host
from cachemoe.offload.plain_torch import plain_torch
from cachemoe.offload.residency import least_recently_used
from cachemoe.offload.resident_engine import ResidentEngine
from cachemoe.offload.store import StoreLayout
from cachemoe.offload.ticket import Ticket


@dataclass
class LayerCount:
    """What one MoE layer has counted.

    Args:
        layer: of the model's decoder.
    """

    layer: int
    slots: int
    selections: int = 0
    misses: int = 0

    @property
    def hit_rate(self) -> float:
        return 1 - self.misses / self.selections if self.selections else 0.0


class PooledExperts:
    """A model's experts, served from a pool of pages: what ``model.cachemoe`` is. Print it for its counters.

    Threads may call the model at the same time: they take turns at a layer's residency and experts. So do ``resize``,
    ``close`` and setting ``routing``.

    Args:
        model: of transformers; its experts' parameters are not used any more.
        source: the ``Checkpoint`` or ``ModelExperts`` that the pages are of.
        layout: of the pages.
        engine: that has or fetches them.
        routing: see ``routing``.
        evict: eviction policy; None: the routing's, or LRU.
        rules: of the routers, if they have just been asked; else they are when a routing needs them.
        calibration: of the model, for routings that need one.
        adaptive: whether a pool is shared among the layers as the calibration's misses say.
        level_bytes: of the levels; None: of full precision alone.
        dense: how the other weights were rounded; None: they were not.
        prefetches: whether a token's next layer is fetched for, as its router would choose by what this one saw.

    Attributes:
        shape: of the MoE layers.
        fingerprint: of the experts' weights.
        layers: a ``LayerCount`` of each MoE layer.
        calls: what is done around the model's calls.
        engine: the ``OffloadEngine`` or ``ResidentEngine``.

    Raises:
        InputError: if the model computes its experts, or routes, in a way that cachemoe does not know.
    """

    def __init__(
        self,
        model,
        source: Checkpoint | ModelExperts,
        layout: StoreLayout,
        engine: OffloadEngine | ResidentEngine,
        routing: Strategy,
        evict: Callable | None,
        rules: list[RoutingRule] | None = None,
        calibration: Calibration | None = None,
        adaptive: bool = False,
        level_bytes: LevelBytes | None = None,
        dense: DenseRounding | None = None,
        prefetches: bool = False,
    ):
        self.engine, self.shape, self.fingerprint, self.dense = engine, source.shape, layout.model, dense
        self._owned = ExitStack()
        self._model, self._asked_evict, self._calibration, self._adaptive = model, evict, calibration, adaptive
        self._evict = evict or least_recently_used
        self._level_bytes = level_bytes or LevelBytes([layout.page_format.page_bytes])
        self._prefetches = prefetches
        self._made_for = routing  # which the pool's levels, and whether layers share it, are for
        if calibration is not None:
            calibration.check(self.fingerprint, len(self.shape.layers), self.shape.experts, self.shape.top_k)
        self._lock = Lock()
        _POOLED.add(self)
        self._rounded = rounds(layout.page_format, source.dtype)
        layers = moe_layers(model)
        check_count(model, layers, self.shape)
        self._activations = [getattr(layer.experts, "act_fn", None) for layer in layers]
        self._rules, self._marks, self._seen = rules, None, None
        self._chooser: Chooser | None = None
        self._source: Ahead | None = None
        self._forecast: Forecast | None = None
        self._steps: dict[torch.nn.Module, Step] = {}  # by the module after its attention
        self._batch, around = BatchShape(), []
        if model.device.type == "cpu" and model.dtype == torch.bfloat16:
            around = [DecodeThreads(lambda: self.counters.stall_s).during]
        self.calls = ModelCalls(model, self._batch.during, *around)
        self._gates = ExitStack()  # that say ahead of a layer what it will choose, while a routing asks them
        self.reset_counters()
        self._swap = Swap(model, None, self._run, self._run_chosen, self._lock).__enter__()
        self._is_closed = False
        self.routing = routing
        close_doors(model, layers)
        model.cachemoe = self

    def join(self, steps: Sequence[Step]) -> None:
        """Let decoder layers that take one token in one call run its experts there, too, where that can be."""
        self._steps = {step.feed: step for step in steps}
        self._reroute(self._routing)

    def keep(self, owned: ExitStack) -> None:
        """Close what is owned with this, or when the model is no more."""
        self._owned = owned
        weakref.finalize(self._model, owned.close)

    @property
    def routing(self) -> Strategy:
        """The routing strategy; set another between two tokens, as ``load`` takes it."""
        return self._routing

    @routing.setter
    @plain_torch()
    def routing(self, routing: Strategy | str | None) -> None:
        self._check_open()
        routing = checked(routing, self.shape.experts, self.shape.top_k)
        routing.check_calibration(self._calibration)
        slots = int(self.engine.state.capacity.min())
        routing.check_slots(slots, self.shape.experts, self.shape.top_k)
        state = self.engine.state
        rule, ranks = routing.rule, self._level_bytes.surrogates
        lacks = rule.cheaper >= state.levels or (rule.shared and not state.shared)
        if lacks or (rule.cheaper and rule.resident != bool(ranks)) or (rule.resident and routing.value not in ranks):
            raise InputError(f"{routing} needs a pool of its own kind: load the model with it")
        if routing.rule.prefetches and isinstance(self.engine, OffloadEngine) and not self.engine.staging:
            raise InputError(f"{routing} fetches ahead, and this pool has no room for that: load the model with it")
        if not self._retuned(routing):
            self._reroute(routing)
        self._routing = routing

    @property
    def label(self) -> str:
        """What differs from the model: ``exact``, or which of routing and precision changed."""
        changes = [self.routing.label] if self.routing.label != EXACT else []
        return ", ".join(changes + [PRECISION_CHANGED] * (self._rounded or self.dense is not None)) or EXACT

    def resize(self, pool: str | int) -> None:
        """Change the pool between two tokens; see ``load``.

        Raises:
            InputError: as ``load``, or if all experts are in memory for good.
        """
        self._check_open()
        if not isinstance(self.engine, OffloadEngine):
            raise InputError("there is nothing to resize: every expert is in memory")
        slots = slots_of(pool, self.shape, self.engine.page_format.page_bytes)
        places = self.routing.places(self.shape.experts, self.shape.top_k)
        if self._adaptive:
            slots = adaptive_slots(slots, self._calibration, places)
        self.routing.check_slots(min(slots), self.shape.experts, self.shape.top_k)
        capacity, cheaper = split_pool(slots, self._made_for, self._level_bytes, self.shape.experts, places)
        with self._lock:
            try:
                self.engine.resize(capacity, cheaper)
            finally:  # an engine that could not may have the old capacities or the new
                for count, slots in zip(self.layers, self._slots(), strict=True):
                    count.slots = slots
                self._swap.forget()

    def save_residency(self, path: str | os.PathLike) -> None:
        """Write who is resident, for ``load(..., residency=path)``: a new process then begins with them.

        Raises:
            InputError: for a pool with levels, or that layers share.
            OSError: if it cannot be written.
        """
        self._check_open()
        with self._lock:
            save_residency(self.engine.state, Path(path), self.fingerprint, type(self._model).__name__)

    def reset_counters(self) -> None:
        """Count anew; what is resident stays."""
        self.engine.counters = Counters()
        self.layers = [LayerCount(layer, count) for layer, count in zip(self.shape.layers, self._slots(), strict=True)]

    def _slots(self) -> list[int]:
        """Slots of each layer for full precision; of a cache that all share, as many as each has on average."""
        state, layers = self.engine.state, len(self.shape.layers)
        return [int(state.capacity[0]) // layers] * layers if state.shared else state.capacity.tolist()

    def close(self) -> None:
        """End the engine's threads and close the store. The experts are gone: the model raises where it needs them."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._swap.__exit__()
                for layer in self._swap.layers:
                    layer.experts.forward = _closed
                self._gates.close()
                self.calls.close()
            self._owned.close()

    def __reduce_ex__(self, protocol):
        raise uncopiable()

    def __str__(self) -> str:
        c, slots, page_format = self.counters, int(self.engine.state.capacity.sum()), self.engine.page_format
        pages = len(self.layers) * self.shape.experts
        rate = f" ({c.misses / c.selections:.1%})" if c.selections else ""
        seen = self._chooser is not None and self.routing.rule.sees_cost
        cost = f"; an absent expert takes {exp(self._chooser.miss_cost):.1f} times as long" if seen else ""
        return (
            f"pool: {slots} of {pages} experts ({slots / pages:.0%}), {size_text(slots * page_format.page_bytes)} of "
            f"{page_format.kind} pages{self._cheaper_slots()}\n{self._dense_weights()}"
            f"routing: {self.routing}; {self.label}{cost}\n"
            f"selections: {c.selections}, hits {c.hits}, misses {c.misses}{rate}; in a prompt an expert misses once\n"
            f"read: {size_text(c.bytes_read)} in {c.pages_read} pages, {c.stall_s:.2f} s waited for; experts computed "
            f"in {c.compute_s:.2f} s"
        )

    def _cheaper_slots(self) -> str:
        """In words, what the cheaper levels have."""
        state, said = self.engine.state, ""
        for page_format, count in zip(self.engine.formats[1:], state.cheaper, strict=False):
            slots = count * len(state.capacity)
            said += f", and {slots}, {size_text(slots * page_format.page_bytes)}, of {page_format.kind}"
        for rank, size in self._level_bytes.surrogates.items():
            said += f", and surrogates of rank {rank}, {size_text(size * len(self.layers))}"
        return said

    def _dense_weights(self) -> str:
        """In words, how they were rounded; nothing if they were not."""
        if (dense := self.dense) is None:
            return ""
        place, worst = max(dense.errors.items(), key=lambda each: each[1])
        sizes = f"{size_text(dense.bytes_after)} of {dense.kind} in place of {size_text(dense.bytes_before)}"
        return f"dense weights: {sizes}; rounding error {worst:.1%} at most, of {place}\n"

    @property
    def counters(self) -> Counters:
        """Of all layers; see ``Counters``."""
        return self.engine.counters

    def _router(self, routing: Strategy) -> Callable[..., Routing] | None:
        """What routes by that strategy; None: the model itself does. The model has its own routers meanwhile."""
        chooser = source = prefetcher = route = forecast = None
        with ExitStack() as asked:
            gates = asked.enter_context(gates_ahead(self._model, routing.rule, self._calibration))
            rule, layers = routing.rule, len(self.shape.layers)
            self._evict = self._asked_evict or least_recently_used
            if rule.evict is not None and self._asked_evict is None:
                self._evict = rule.evict(self._calibration, layers, self.shape.top_k)
            self.engine.evict = self._evict
            if routing.label != EXACT:
                cost = self.engine.miss_cost() if routing.rule.sees_cost else 0.0
                known = {"calibration": self._calibration, "miss_cost": cost, "gates_prompts": False}
                chooser = Chooser(self._asked(), self.shape.top_k, [routing], self._evict, **known)
                route = partial(self._route, chooser)
            if routing.rule.prefetches or (self._prefetches and not routing.rule.decides):
                ahead = chooser or Chooser(self._asked(), self.shape.top_k, [Original()], self._evict)

                def expected(layer, logits):
                    return ahead.peek(layer, logits.cpu(), self._state(layer))

                prefetcher = Foretold(gates or gates_of(self._swap.layers), expected)
                if routing.rule.forecasts:
                    forecast = Forecast(gates, expected, int(routing.value))
            if routing.rule.decides:
                acquire = self.engine.acquire if isinstance(self.engine, OffloadEngine) else None
                source = Ahead(gates, route, acquire)
                route = source.route
            if isinstance(self.engine, OffloadEngine) and self.engine.staging:
                self.engine.prefetcher = prefetcher
            self._chooser, self._source, self._forecast = chooser, source, forecast
            self._routers = self._routers_in_c(routing)
            self._gates.close()
            self._gates = asked.pop_all()
        return route

    def _reroute(self, routing: Strategy) -> None:
        try:
            self._swap.reroute(partial(self._router, routing))
        finally:  # with the routers that are there then
            self._join_layers()

    def _routers_in_c(self, routing: Strategy) -> dict[int, Router]:
        """Of MoE layers in decoder layers that take a token in one call, the routers, where they can be part of it."""
        layers = self._swap.layers
        joined = {number: layer for number, layer in enumerate(layers) if layer.block in self._steps and layer.router}
        if not joined or self._source or self._forecast or not isinstance(self.engine, OffloadEngine):
            return {}
        if not self.engine.is_plain:
            return {}
        try:
            chooser = self._chooser or Chooser(self._asked(), self.shape.top_k, [Original()], self._evict)
        except InputError:  # a router that cachemoe does not know, and need not for exact routing
            return {}
        chosen = {number: chooser.in_c(number) for number in joined}
        places = self._chooser is None
        routers = {n: router_of(layer, probe(layer), chosen[n], places) for n, layer in joined.items() if chosen[n]}
        return {number: router for number, router in routers.items() if router is not None}

    def _join_layers(self) -> None:
        """Let decoder layers take one token in one call, with the routers that are swapped in now."""
        for step in self._steps.values():
            step.whole = None
        for number, router in self._routers.items():
            layer = self._swap.layers[number]
            step, contents = self._steps[layer.block], Contents(layer.block, layer.router, layer.experts)
            step.whole = partial(self._take, WholeLayer(number, step.attention, router, contents))

    def _take(self, whole: WholeLayer, x: torch.Tensor, *arguments) -> torch.Tensor | None:
        """One token through a decoder layer, with the arguments of ``Attention.step``; None: by its modules."""
        refuse_transforms(x)
        number = whole.number
        with self._lock:
            if not whole.contents.unchanged:
                return None
            self._check_own(number)
            state = self._state(number)
            made = whole.layer
            if made is None or made.state is not state or not self.engine.is_current(number, made):
                whole.layer = self.engine.layer_in_c(number, whole.attention, whole.router, state)
            if whole.layer is None:
                return None
            self._swap.forget(number)
            count, before = self.layers[number], self.counters.misses
            y = self.engine.step(number, whole.layer, x, *arguments)
            if y is not None:
                count.selections += whole.router.top_k
                count.misses += self.counters.misses - before
            return y

    def _asked(self) -> list[RoutingRule]:
        """The routers' rules; routers are asked again if they have been changed since."""
        marks = router_marks(self._swap.layers)
        if self._rules is None or self._marks not in (None, marks):
            self._rules = routing_rules(self._swap.layers, self.shape.top_k, "cpu")
        self._marks = marks
        return self._rules

    def _retuned(self, routing: Strategy) -> bool:
        """Whether other numbers for the chooser in place are all that the routing needs."""
        if self._chooser is None or routing.label == EXACT or router_marks(self._swap.layers) != self._marks:
            return False
        with self._lock:
            return self._chooser.retune([routing])

    def _state(self, layer: int) -> Residency:
        """``[1, ...]``, the engine's: another after it was resized."""
        if self._seen is not self.engine.state:
            self._states = [self.engine.caches(i) for i in range(len(self.layers))]
            self._seen = self.engine.state
        return self._states[layer]

    def _route(self, chooser: Chooser, layer: int, logits: torch.Tensor, *_) -> Routing:
        (logits,) = to_host(logits)
        return chooser.route(layer, self._batch.by_sequence(logits), self._state(layer))

    def _place(self, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> Routing:
        if self.engine.holds_all(layer):
            return Routing.all_hits(ids[None], weights[None])
        ids, weights = to_host(ids, weights)
        count, slots = self.shape.experts, self.layers[layer].slots
        every = ids.numpy()
        if ids.shape[1] > slots or (every.size and not 0 <= every.min() <= every.max() < count):
            raise InputError(
                f"MoE layer {layer} is asked for {ids.shape[1]} experts a token, {every.min()} to {every.max()}: "
                f"it has {count}, and {slots} slots for them"
            )
        if self._forecast is not None:
            self._forecast.note(layer, ids, self._state(layer))
        drops = None
        if self._routing.rule.grade is not None:  # an expert that this thread's routing dropped has no weight
            drops = self._batch.by_sequence((weights == 0) & (weights != 0).any(1, keepdim=True))
        how = self._state(layer), self._evict, drops
        if len(ids := self._batch.by_sequence(ids)) > 1:
            return place_batch(ids, self._batch.by_sequence(weights), *how)
        return route_cpu.place(ids, weights[None], *how)

    def _run_chosen(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The output of experts that the model's own router chose, or that another's code has changed."""
        self._check_own(layer)
        hidden = hidden.contiguous()
        if self._source is None and self._forecast is None and self._routing.rule.grade is None:
            y = self.engine.hit(layer, hidden, ids, weights) if isinstance(self.engine, OffloadEngine) else None
            if y is not None:
                self.layers[layer].selections += ids.numel()
                return y
        return self._fetch_and_run(layer, hidden, self._place(layer, ids, weights))

    def _run(self, layer: int, hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
        self._check_own(layer)
        return self._fetch_and_run(layer, hidden, routing)

    def _fetch_and_run(self, layer: int, hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
        count, before, selected = self.layers[layer], self.counters.misses, self.counters.selections
        asked = routing if self._source is None else self._source.claim(layer, routing)
        if isinstance(asked, Ticket) and not self.engine.holds_good(asked):  # another thread's call came between
            asked = self._place(layer, routing.ids[0], routing.weights[0])
        y = self.engine.forward(layer, hidden.contiguous(), asked)
        count.selections += self.counters.selections - selected
        count.misses += self.counters.misses - before
        return y

    def _check_own(self, layer: int) -> None:
        """Whether nobody has given the experts other weights or another activation, which pages know nothing of."""
        experts = self._swap.layers[layer].experts
        own = all(type(parameter) is PooledParameter for parameter in experts._parameters.values())
        if not own or getattr(experts, "act_fn", None) is not self._activations[layer]:
            raise InputError(
                "the experts of this model are in cachemoe's pool, and do not compute with parameters or an activation "
                "put in their place: change the checkpoint, and load that"
            )

    def _check_open(self) -> None:
        if self._is_closed:
            _closed()

    def _renew_lock(self) -> None:
        self._lock = self._swap.lock = Lock()


_POOLED: weakref.WeakSet[PooledExperts] = weakref.WeakSet()
# A thread that is not in the forked process may have held the lock.
os.register_at_fork(after_in_child=lambda: [pooled._renew_lock() for pooled in _POOLED])


def _closed(*_):
    raise RuntimeError("the model's experts are closed: load it again")
