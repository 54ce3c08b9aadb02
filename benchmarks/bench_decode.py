"""What the CPU engine adds to its experts: one token in one layer, every page in memory, at Qwen1.5-MoE's geometry."""

from functools import partial

import pytest
import torch

from cachemoe.benchmarks.micro import Subject, Work
from cachemoe.benchmarks.payload import PAYLOAD_FORMATS, random_pages
from cachemoe.benchmarks.timing import plan_round
from cachemoe.kernels.experts_cpu import side_by_side
from cachemoe.kernels.reference import Routing
from cachemoe.offload.engine import OffloadEngine
from cachemoe.offload.store import ExpertStore, StoreLayout, write_store

REPETITIONS = range(3)
GEOMETRY = "qwen1.5-moe"
EXPERTS, TOP_K, PAGE_FORMAT = 60, 4, PAYLOAD_FORMATS[GEOMETRY]
WORK = Work(TOP_K * PAGE_FORMAT.weight_bytes)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """All experts resident, expert e in slot e."""
    path = tmp_path_factory.mktemp("store") / "store.safetensors"
    layout = StoreLayout("benchmark", 1, EXPERTS, PAGE_FORMAT)
    write_store(path, layout, random_pages(layout))
    with ExpertStore(path) as store, OffloadEngine(store, [EXPERTS]) as engine:
        engine.state.expert_of[0] = engine.state.slot_of[0] = torch.arange(EXPERTS)
        engine.fill()
        yield engine


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


@pytest.mark.parametrize("implementation", ["matmuls alone", "cachemoe"])
@pytest.mark.parametrize("repetition", REPETITIONS)
def test_engine(measure, engine, routings, repetition, implementation):
    x = torch.randn(1, PAGE_FORMAT.hidden, generator=torch.Generator().manual_seed(0)).to(PAGE_FORMAT.compute_dtype)
    run = partial(matmuls, engine, x) if implementation == "matmuls alone" else partial(engine.forward, 0, x)
    with torch.inference_mode():
        timed = plan_round([partial(run, routing) for routing in routings], torch.device("cpu"), capturable=False)
        measure(Subject("engine", GEOMETRY, 1, PAGE_FORMAT.kind, implementation), WORK, repetition, timed)
