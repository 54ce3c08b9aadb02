"""The latency table: decode, token by token, with experts really moving, beside the quality that each setting costs."""

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter

import torch

from cachemoe.benchmarks.latency_prefetch import ADMISSION, NO_PREFETCH, ORACLE, admits, make_prefetcher
from cachemoe.kernels.state import STATE, Residency
from cachemoe.moe.chooser import Chooser
from cachemoe.moe.decode_graph import WARM_UP, DecodeGraph
from cachemoe.moe.layers import moe_layers, recorded_routers, routing_rules
from cachemoe.moe.models import static_cache
from cachemoe.moe.policies.rule import EXACT
from cachemoe.moe.quality import Evaluation, Setting, eviction_of, forecast_of
from cachemoe.moe.routers import RoutingRule
from cachemoe.moe.shape import MoeShape
from cachemoe.moe.sources import Ahead, Foretold, Gate, gates_ahead
from cachemoe.moe.strategies import Strategy
from cachemoe.moe.swap import Swap
from cachemoe.offload.counters import Counters
from cachemoe.offload.device_engine import DeviceEngine
from cachemoe.offload.engine import OffloadEngine
from cachemoe.offload.resident_engine import ResidentEngine
from cachemoe.offload.timeline import Timeline

RESIDENT = "resident"
FREE_MISSES = "free misses"
IN_A_GRAPH = "in a graph"
DECODE_EXPERTS = "batched_mm"  # transformers' own choice for one token at a time
ORIGINAL = Strategy("original")


@dataclass
class Decode:
    """One row's decode: what is timed, in which engine, and what came of it.

    Args:
        name: the row.
        setting: its strategy and capacity.
        engine: where its experts run.
        state: its caches between segments, ``[L]``.
        prefetch: name of its prefetcher.
        seconds: of each token, a list for each segment.
        counters: of all segments together.
    """

    name: str
    setting: Setting
    engine: OffloadEngine | ResidentEngine | DeviceEngine
    state: Residency
    prefetch: str = NO_PREFETCH
    seconds: list[list[float]] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)
    route_s: float = 0.0


@dataclass(frozen=True)
class DecodePlan:
    """How decode is measured.

    Args:
        windows: ``[segments, tokens]``: of each segment, ``prefix`` tokens of context and then the tokens timed.
        prefix: tokens run in one forward before the clock starts.
        evict: eviction policy.
        native: whether the engine's experts are the model's own, or a payload beside them.
        ahead: layers that prefetchers look ahead.
        profiled: ``[T, L, K]`` what the unmodified model chose in the text before.
        timeline: records routing and the tokens' beginnings, if given.
        known: what ``Chooser`` is told of the model and the machine.
    """

    windows: torch.Tensor
    prefix: int
    evict: Callable
    native: bool
    ahead: int
    profiled: torch.Tensor
    timeline: Timeline | None = None
    known: dict = field(default_factory=dict)


def rows_at(
    capacity: int,
    settings: Sequence[Setting],
    prefetchers: Sequence[str],
    evaluation: Evaluation,
    offload: Callable[[Strategy, bool], OffloadEngine],
    resident: ResidentEngine,
    driven: DeviceEngine | None,
    driven_resident: DeviceEngine | None,
    shape: MoeShape,
) -> list[Decode]:
    """The rows of one capacity: the references, then the settings with the caches that the quality pass left.

    The oracle knows the unmodified model's choices, and so goes with exact routing alone; experts are admitted where
    some give way to others, or run at a cheaper level.

    Args:
        offload: the engine whose pool is of the kind that a strategy needs, and that admits experts or does not.
        driven, driven_resident: of the capacity and with everything resident, for rows driven by the device; or None.
    """
    full = Residency.empty(torch.full((len(shape.layers),), shape.experts), shape.experts)
    full.slot_of.copy_(torch.arange(shape.experts).expand_as(full.slot_of))
    full.page_of.copy_(full.slot_of)
    here = [(s, q) for s, q in zip(settings, evaluation.settings, strict=True) if s.capacity == capacity]
    original = next(q for s, q in here if s.strategy == ORIGINAL)
    rows = [
        Decode(RESIDENT, Setting(ORIGINAL, shape.experts), resident, full),
        Decode(FREE_MISSES, Setting(ORIGINAL, capacity), resident, original.state.clone().with_slots(capacity)),
    ]
    for s, q in here:
        for prefetch in [s.strategy.rule.source] if s.strategy.rule.prefetches else prefetchers:
            admitting = prefetch == ADMISSION
            if (prefetch != ORACLE or s.strategy.label == EXACT) and (not admitting or admits(s.strategy)):
                own = prefetch == NO_PREFETCH or s.strategy.rule.prefetches
                name = str(s.strategy) if own else f"{s.strategy} + {prefetch}"
                engine = offload(s.strategy, admitting)
                # The state came from a batch whose largest capacity was higher.
                state = q.state.clone().with_slots(engine.state.page_of.shape[-1])
                rows.append(Decode(name, s, engine, state, prefetch))
    if driven is not None:
        everything = Setting(ORIGINAL, shape.experts)
        rows.append(Decode(f"{RESIDENT} {IN_A_GRAPH}", everything, driven_resident, full.clone()))
        for s, q in here:
            rule = s.strategy.rule
            # As many places as the engine has, of one level, in caches of each layer.
            if rule.places is None and rule.source is None and not rule.cheaper and not rule.shared:
                rows.append(Decode(f"{s.strategy} {IN_A_GRAPH}", s, driven, q.state.clone().with_slots(capacity)))
    return rows


@torch.inference_mode()
def decode_rows(model, shape: MoeShape, rows: Sequence[Decode], plan: DecodePlan, progress: Callable[[], None]) -> None:
    """Decode every segment with every row, rows interleaved in a new order each segment; fills in ``rows``.

    Raises:
        InputError: if a page cannot be read, or is damaged.
    """
    order = list(rows)
    shuffle = random.Random(0).shuffle
    prefill_experts = model.get_experts_implementation()
    rules = routing_rules(moe_layers(model), shape.top_k, "cpu")
    try:
        for window in plan.windows:
            shuffle(order)
            for row in order:
                model.set_experts_implementation(prefill_experts)
                window = window.to(model.device)
                if isinstance(row.engine, DeviceEngine):
                    _decode_in_a_graph(model, shape, row, window, plan, rules)
                else:
                    with gates_ahead(model, row.setting.strategy.rule, plan.known.get("calibration")) as gates:
                        _decode_segment(model, shape, row, window, plan, rules, gates)
                progress()
    finally:
        model.set_experts_implementation(prefill_experts)


def _decode_segment(
    model,
    shape: MoeShape,
    row: Decode,
    window: torch.Tensor,
    plan: DecodePlan,
    rules: Sequence[RoutingRule],
    gates: Sequence[Gate],
) -> None:
    engine, strategies, rule = row.engine, [row.setting.strategy], row.setting.strategy.rule
    layers = len(shape.layers)
    evict = eviction_of(rule, plan.evict, plan.known.get("calibration"), shape)
    chooser = Chooser(rules, shape.top_k, strategies, evict, gates_prompts=False, **plan.known)
    engine.state, engine.evict = row.state, evict
    states = [engine.caches(layer) for layer in range(layers)]
    payload_input = _payload_input(engine, model.device)
    route_s = 0.0

    forecast = forecast_of(row.setting.strategy, gates, rules, row.state, shape)

    def choose(layer, logits):
        if forecast is not None:
            forecast.note(layer, logits, row.state)
        return chooser.route(layer, logits[None].cpu(), states[layer])

    acquire = engine.acquire if isinstance(engine, OffloadEngine) else None
    source = Ahead(gates, choose, acquire) if rule.decides else None

    def route_layer(layer, logits, hidden):
        return source.route(layer, logits, hidden) if source else choose(layer, logits)

    def run(layer, x, routing, gate_input=None):
        return engine.forward(layer, x, source.claim(layer, routing) if source else routing, gate_input)

    def route_timed(layer, logits, hidden):
        nonlocal route_s
        start = perf_counter()
        routing = route_layer(layer, logits, hidden)
        end = perf_counter()
        route_s += end - start
        if plan.timeline is not None:
            plan.timeline.span("route", f"layer {layer}", start, end, layer=layer)
        return routing

    def route_and_move(layer, logits, hidden):
        routing = route_timed(layer, logits, hidden)
        run(layer, payload_input, routing, hidden)
        return routing

    swap = Swap(model, route_layer)
    trace = None
    if row.prefetch == ORACLE:  # what the unmodified model chooses
        with recorded_routers(model) as answers:
            model(window[None])
        trace = torch.stack([answer.ids[plan.prefix :] for (answer,) in answers], 1).cpu()
    with swap:
        past = model(window[None, : plan.prefix], use_cache=True).past_key_values
    if isinstance(engine, OffloadEngine):
        engine.fill()

        def expected(layer, logits):
            return chooser.peek(layer, logits.cpu(), states[layer])

        named = row.prefetch, engine, swap.routers, expected, shape.top_k, plan.ahead, trace, plan.profiled
        engine.prefetcher = Foretold(gates, expected) if rule.prefetches else make_prefetcher(*named)
    engine.counters = row.counters
    seconds = []
    model.set_experts_implementation(DECODE_EXPERTS)
    with ExitStack() as stack:
        if plan.native:
            stack.enter_context(Swap(model, route_timed, run))
        else:
            stack.enter_context(Swap(model, route_and_move))
        for token in window[plan.prefix :]:
            start = perf_counter()
            model(token[None, None], past_key_values=past, use_cache=True)
            if token.is_cuda:
                torch.cuda.synchronize()
            seconds.append(perf_counter() - start)
            if plan.timeline is not None:
                plan.timeline.mark(f"{row.name}: token {len(seconds)}", start)
    if isinstance(engine, OffloadEngine):
        engine.prefetcher = None  # and what is still under way is counted as waste
        engine.synchronize()
    row.seconds.append(seconds)
    row.route_s += route_s


def _decode_in_a_graph(
    model, shape: MoeShape, row: Decode, window: torch.Tensor, plan: DecodePlan, rules: Sequence[RoutingRule]
) -> None:
    engine, strategies = row.engine, [row.setting.strategy]
    chooser = Chooser(rules, shape.top_k, strategies, plan.evict, model.device, gates_prompts=False, **plan.known)
    payload_input = _payload_input(engine, model.device)

    def route_prefix(layer, logits, hidden):
        return chooser.route(layer, logits[None], engine.caches(layer))

    def route_token(layer, logits, hidden):
        return chooser.route(layer, logits[None], engine.caches(layer), engine.routing(layer))

    def route_and_move(layer, logits, hidden):
        routing = route_token(layer, logits, hidden)
        engine.forward(layer, payload_input, routing)
        return routing

    for name in STATE:
        getattr(engine.state, name).copy_(getattr(row.state, name))
    first = plan.prefix - WARM_UP - 1  # the last tokens of the context warm up and are captured
    past = static_cache(model, len(window))
    with Swap(model, route_prefix):
        model(window[None, :first], past_key_values=past, use_cache=True)
    engine.fill()
    model.set_experts_implementation(DECODE_EXPERTS)
    seconds = []
    with Swap(model, route_token, engine.forward) if plan.native else Swap(model, route_and_move):
        graph = DecodeGraph(model, past)
        for place, token in enumerate(window[first:], first):
            if place == plan.prefix:
                engine.reset_counters()
            start = perf_counter()
            graph.step(token)
            if token.is_cuda:
                torch.cuda.synchronize()
            if place >= plan.prefix:
                seconds.append(perf_counter() - start)
    row.counters.add(engine.counters)
    row.state = engine.state.to("cpu").clone()
    row.seconds.append(seconds)


def _payload_input(engine, device) -> torch.Tensor:
    """``[1, H]``, the same each time."""
    x = torch.randn(1, engine.page_format.hidden, generator=torch.Generator().manual_seed(0))
    return x.to(device, engine.page_format.compute_dtype)
