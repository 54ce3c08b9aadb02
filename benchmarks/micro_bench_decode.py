"""What the CPU engine adds to its experts: one token in one layer, every page in memory, at Qwen1.5-MoE's geometry.

``everything on`` records a timeline and prefetches: the next layer's gate under cache-prior, asked where a page could
still land in time, which layers that hit may leave no time for.
"""

from functools import partial

import pytest
import torch

from cachemoe.benchmarks.micro_figures import Subject, Work
from cachemoe.benchmarks.micro_turns import REPETITIONS
from cachemoe.benchmarks.payload import PAYLOAD_FORMATS, random_pages
from cachemoe.benchmarks.timing import plan_round
from cachemoe.kernels.experts_cpu import side_by_side
from cachemoe.kernels.route_cpu import peek
from cachemoe.kernels.state import Routing
from cachemoe.moe.strategies import CachePrior, policy_of
from cachemoe.offload.engine import OffloadEngine
from cachemoe.offload.prefetch import NextLayerGate
from cachemoe.offload.store import ExpertStore, StoreLayout, write_store
from cachemoe.offload.timeline import Timeline

GEOMETRY = "qwen1.5-moe"
LAYERS, EXPERTS, TOP_K, PAGE_FORMAT = 2, 60, 4, PAYLOAD_FORMATS[GEOMETRY]
WORK = Work(TOP_K * PAGE_FORMAT.weight_bytes)
IMPLEMENTATIONS = ("matmuls alone", "cachemoe", "cachemoe, everything on")


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Two engines with all experts resident, expert e in slot e; the second with everything on."""
    path = tmp_path_factory.mktemp("store") / "store.safetensors"
    layout = StoreLayout("benchmark", LAYERS, EXPERTS, PAGE_FORMAT)
    write_store(path, layout, random_pages(layout))
    capacity = [EXPERTS] * LAYERS
    with (
        ExpertStore(path) as store,
        OffloadEngine(store, capacity) as plain,
        OffloadEngine(store, capacity, staging=4, timeline=Timeline()) as full,
    ):
        for engine in (plain, full):
            engine.state.page_of[:] = engine.state.slot_of[:] = torch.arange(EXPERTS)
            engine.fill()
        routers = torch.randn(LAYERS, EXPERTS, PAGE_FORMAT.hidden, generator=torch.Generator().manual_seed(0))
        states, policy = (
            [full.state[layer : layer + 1] for layer in range(LAYERS)],
            policy_of(CachePrior(0.2), top_k=TOP_K),
        )
        full.prefetcher = NextLayerGate(routers, lambda layer, logits: peek(logits, states[layer], TOP_K, policy))
        yield {"cachemoe": plain, "cachemoe, everything on": full}


@pytest.fixture(scope="module")
def routings():
    """Other experts each, all hits."""
    made = []
    for first in range(0, EXPERTS, TOP_K):
        ids = torch.arange(first, first + TOP_K).view(1, 1, TOP_K)
        made.append(Routing.all_hits(ids))
    return made


def matmuls(engine, x, routing):
    side_by_side(x, engine._pool.weights, routing.slots.flatten(), PAGE_FORMAT)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("repetition", REPETITIONS)
def test_engine(measure, engines, routings, repetition, implementation):
    x = torch.randn(1, PAGE_FORMAT.hidden, generator=torch.Generator().manual_seed(0)).to(PAGE_FORMAT.compute_dtype)
    if implementation == "matmuls alone":
        calls = [partial(matmuls, engines["cachemoe"], x, routing) for routing in routings]
    else:
        forward = engines[implementation].forward
        calls = [partial(forward, i % LAYERS, x, routing) for i, routing in enumerate([*routings, routings[0]])]
    with torch.inference_mode():
        timed = plan_round(calls, torch.device("cpu"), capturable=False)
        measure(Subject("engine", GEOMETRY, 1, PAGE_FORMAT.kind, implementation), WORK, repetition, timed)
