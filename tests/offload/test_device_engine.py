"""The device-driven engine against the host-driven one: the same bits, the same residency, the same counters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachemoe.kernels.formats import PageFormat
from cachemoe.kernels.policy import ORIGINAL
from cachemoe.kernels.route import route
from cachemoe.moe.strategies import CachePrior, Strategy, policy_of
from cachemoe.offload.device_engine import DeviceEngine
from cachemoe.offload.engine import OffloadEngine
from cachemoe.offload.pinned import PinnedStore
from cachemoe.offload.residency import EVICTION_POLICIES, least_recently_used
from cachemoe.offload.store import ExpertStore, StoreLayout, write_store

LAYERS, EXPERTS, TOP_K, HIDDEN = 3, 9, 2, 64
FORMATS = {"bf16": PageFormat("bf16", HIDDEN, 32), "int4": PageFormat("int4", HIDDEN, 32, 32)}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
REPLAYS = 30 if torch.cuda.is_available() else 3  # interpreted, one takes seconds
TOLERANCE = {"cpu": 0.0, "cuda": 2e-2}  # of the largest output, against the CPU's arithmetic


@pytest.fixture(scope="module", params=FORMATS)
def file(request, tmp_path_factory):
    page_format = FORMATS[request.param]
    generator = torch.Generator().manual_seed(0)

    def page():
        gate_up, down = (torch.randn(shape, generator=generator) / 8 for shape in ((64, HIDDEN), (HIDDEN, 32)))
        return page_format.pack(gate_up, down)

    path = tmp_path_factory.mktemp("store") / "store.safetensors"
    layout = StoreLayout("test", LAYERS, EXPERTS, page_format)
    write_store(path, layout, (page() for _ in range(LAYERS * EXPERTS)))
    with ExpertStore(path) as file:
        yield file


@pytest.fixture
def store(file):
    with PinnedStore(file) as pinned:
        yield pinned


def inputs(seed, device):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(LAYERS, 1, 1, EXPERTS, generator=generator)
    x = torch.randn(LAYERS, 1, HIDDEN, generator=generator).bfloat16()
    return logits.to(device), x.to(device)


def step(engine, layer, logits, x, policy, evict, out=None):
    routing = route(logits, engine.caches(layer), evict, TOP_K, policy, out=out)
    return engine.forward(layer, x, routing)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.gpu_only("interpreted, minutes")])]
)
@pytest.mark.parametrize("read_through", [False, True])
@given(
    tokens=st.integers(1, 12),
    capacity=st.lists(st.integers(TOP_K, EXPERTS), min_size=LAYERS, max_size=LAYERS),
    policy=st.sampled_from([ORIGINAL, policy_of(CachePrior(0.3, 1)), policy_of(Strategy("random-drop", 0.5))]),
    eviction=st.sampled_from(sorted(EVICTION_POLICIES)),
)
def test_as_the_host_driven_engine(file, device, read_through, tokens, capacity, policy, eviction):
    evict = EVICTION_POLICIES[eviction]
    with PinnedStore(file) as store, OffloadEngine(store, capacity, evict=evict) as host:
        driven = DeviceEngine(store, capacity, TOP_K, device, read_through)
        for token in range(tokens):
            for layer in range(LAYERS):
                logits, x = (each[layer] for each in inputs(token, "cpu"))
                expected = step(host, layer, logits, x, policy, evict)
                y = step(
                    driven, layer, logits.to(device), x.to(device), policy.to(device), evict, driven.routing(layer)
                ).cpu()
                error = (y.float() - expected.float()).abs().max()
                assert error <= TOLERANCE[device] * expected.float().abs().max()
        assert torch.equal(driven.state.slot_of.cpu(), host.state.slot_of)  # and waits for a GPU
        there, here = driven.counters, host.counters
        for name in ("calls", "selections", "drops", "hits", "misses", "pages_read", "bytes_read"):
            assert getattr(there, name) == getattr(here, name), name


@pytest.mark.parametrize("device", DEVICES)
def test_fill_brings_what_the_state_says(store, device):
    driven = DeviceEngine(store, [4] * LAYERS, TOP_K, device)
    for layer in range(LAYERS):
        driven.state.page_of[layer] = torch.tensor([5, -1, 2, 7])
        driven.state.slot_of[layer, torch.tensor([5, 2, 7])] = torch.tensor([0, 2, 3], device=device)
    driven.fill()
    for layer in range(LAYERS):
        for slot, e in ((0, 5), (2, 2), (3, 7)):
            assert torch.equal(driven._slots[layer][slot].cpu(), store.page(layer, e))


def test_one_token_at_a_time(store):
    driven = DeviceEngine(store, [4] * LAYERS, TOP_K)
    with pytest.raises(ValueError, match="one token at a time, not 2"):
        driven.forward(0, torch.zeros(2, HIDDEN), driven.routing(0))
    with pytest.raises(ValueError, match="2 capacities given for the store's 3 layers"):
        DeviceEngine(store, [4, 4], TOP_K)


def test_counters_can_begin_anew(store):
    driven = DeviceEngine(store, [TOP_K] * LAYERS, TOP_K)
    logits, x = inputs(0, "cpu")
    for _ in range(2):
        for layer in range(LAYERS):
            step(driven, layer, logits[layer], x[layer], ORIGINAL, least_recently_used, driven.routing(layer))
        misses = driven.counters.misses
        driven.reset_counters()
    assert misses == 0  # the second time the same experts
    assert driven.counters.calls == 0


@pytest.mark.gpu
@pytest.mark.parametrize("read_through", [False, True])
def test_a_graph_of_all_layers_replays_other_routing_as_eager_does(store, read_through):
    policy, capacity = policy_of(CachePrior(0.3, 1)).to("cuda"), [4, 5, 6]
    graphed, eager = (DeviceEngine(store, capacity, TOP_K, "cuda", read_through) for _ in range(2))
    logits, x = inputs(0, "cuda")
    results = torch.empty_like(x)

    def token():
        for layer in range(LAYERS):
            results[layer] = step(
                graphed, layer, logits[layer], x[layer], policy, least_recently_used, graphed.routing(layer)
            )

    for layer in range(LAYERS):  # compiles
        step(eager, layer, logits[layer], x[layer], policy, least_recently_used, eager.routing(layer))
    fresh = DeviceEngine(store, capacity, TOP_K, "cuda", read_through)
    eager.state, graphed.state = fresh.state.clone(), graphed.state
    torch.cuda.synchronize()
    eager.reset_counters()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token()
    for seed in range(REPLAYS):
        new_logits, new_x = inputs(seed, "cuda")
        logits.copy_(new_logits)
        x.copy_(new_x)
        graph.replay()
        for layer in range(LAYERS):
            expected = step(
                eager, layer, new_logits[layer], new_x[layer], policy, least_recently_used, eager.routing(layer)
            )
            assert torch.equal(results[layer], expected)
        assert torch.equal(graphed.state.slot_of, eager.state.slot_of)
    torch.cuda.synchronize()
    assert graphed.counters == eager.counters
