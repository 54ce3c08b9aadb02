"""Microbenchmarks of one token in one layer, on the CPU, at Qwen1.5-MoE-A2.7B's geometry. Run with ``make bench``.

Every round takes other experts, so that the processor's cache does not flatter the figures.
"""

from itertools import cycle

import pytest
import torch

from cachemoe.benchmarks.payload import GEOMETRIES, random_pages
from cachemoe.kernels.experts import expert
from cachemoe.kernels.reference import Routing
from cachemoe.kernels.route import route
from cachemoe.moe.strategies import Strategy, cache_bias
from cachemoe.offload.engine import OffloadEngine
from cachemoe.offload.residency import Residency, least_recently_used
from cachemoe.offload.store import ExpertStore, StoreLayout, write_store

EXPERTS, TOP_K, PAGE_FORMAT = 60, 4, GEOMETRIES["qwen1.5-moe"]
ALL_HITS = "one layer, four experts, every page in memory"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "store.safetensors"
    layout = StoreLayout("benchmark", 1, EXPERTS, PAGE_FORMAT)
    write_store(path, layout, random_pages(layout))
    with ExpertStore(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def engine(store):
    """All experts resident, expert e in slot e."""
    with OffloadEngine(store, [EXPERTS]) as engine:
        engine.state.expert_of[0] = engine.state.slot_of[0] = torch.arange(EXPERTS)
        engine.fill()
        yield engine


@pytest.fixture
def routings():
    """Other experts each time, all hits."""
    made = []
    for first in range(0, EXPERTS, TOP_K):
        ids = torch.arange(first, first + TOP_K).view(1, 1, TOP_K)
        made.append(Routing.all_hits(ids))
    return cycle(made)


@pytest.fixture
def x():
    return torch.randn(1, PAGE_FORMAT.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.benchmark(group=ALL_HITS)
def test_the_matmuls_alone(benchmark, engine, routings, x):
    def run():
        for slot in next(routings).slots.flatten().tolist():
            expert(x, engine._pool.weights(0, slot), PAGE_FORMAT)

    benchmark.extra_info["bytes"] = TOP_K * PAGE_FORMAT.weight_bytes
    with torch.inference_mode():
        benchmark.pedantic(run, rounds=300, warmup_rounds=30)


@pytest.mark.benchmark(group=ALL_HITS)
def test_through_the_engine(benchmark, engine, routings, x):
    benchmark.extra_info["bytes"] = TOP_K * PAGE_FORMAT.weight_bytes
    with torch.inference_mode():
        benchmark.pedantic(lambda: engine.forward(0, x, next(routings)), rounds=300, warmup_rounds=30)


@pytest.mark.benchmark(group="route, one token of 60 experts, 30 slots")
@pytest.mark.parametrize("name", ["original", "max-rank:8", "cumsum:0.7", "cache-prior:0.2"])
def test_route(benchmark, name):
    logits = cycle(torch.randn(1, 200, EXPERTS, generator=torch.Generator().manual_seed(0)).split(1, 1))
    state = Residency.empty(torch.tensor([EXPERTS // 2]), EXPERTS)
    bias = cache_bias([Strategy.parse(name, EXPERTS, TOP_K)], 2)
    with torch.inference_mode():
        benchmark.pedantic(
            lambda: route(next(logits), state, least_recently_used, TOP_K, bias), rounds=1000, warmup_rounds=200
        )
