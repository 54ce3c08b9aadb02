"""What only a GPU shows of the engines: the device that is timed, what a closed link leaves behind, which tiles."""

import time

import pytest
import torch

from cachemoe.kernels.experts_tiles import prefill_tiles
from cachemoe.kernels.formats import PageFormat
from cachemoe.kernels.launch import Launch
from cachemoe.kernels.route_cpu import place
from cachemoe.kernels.state import Routing
from cachemoe.offload.carriers import CopyCarrier
from cachemoe.offload.engine import OffloadEngine
from cachemoe.offload.link import Link
from cachemoe.offload.pinned import PinnedStore
from cachemoe.offload.pool import ExpertPool
from cachemoe.offload.residency import least_recently_used
from cachemoe.offload.resident_engine import ResidentEngine
from cachemoe.offload.store import ExpertStore, StoreLayout, write_store

pytestmark = pytest.mark.gpu
LAYERS, EXPERTS, HIDDEN = 8, 4, 32
FORMAT = PageFormat("fp32", HIDDEN, 32)


def pages():
    generator = torch.Generator().manual_seed(0)
    for _ in range(LAYERS * EXPERTS):
        gate_up, down = (torch.randn(shape, generator=generator) / 8 for shape in ((64, HIDDEN), (HIDDEN, 32)))
        yield FORMAT.pack(gate_up, down)


@pytest.fixture
def layout():
    return StoreLayout("test", LAYERS, EXPERTS, FORMAT)


@pytest.fixture
def store(tmp_path, layout):
    write_store(tmp_path / "store", layout, pages())
    with ExpertStore(tmp_path / "store") as file, PinnedStore(file) as pinned:
        yield pinned


def test_a_link_that_an_exception_closes_leaves_no_copy_under_way(store):
    carrier = CopyCarrier(store, ExpertPool(1, FORMAT, "cuda"))
    with pytest.raises(KeyError), Link([carrier]) as link:
        transfer = link.request(0, 0, 0)
        while not transfer.landed:  # which is when it is queued
            time.sleep(1e-3)
        raise KeyError
    assert carrier._stream.query()


def test_an_engine_times_its_own_device(store):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ids = torch.tensor([[[2, 0]]])
    with OffloadEngine(store, [EXPERTS] * LAYERS, "cuda:1") as engine:
        routing = place(ids, torch.full(ids.shape, 0.5), engine.caches(0), least_recently_used)
        engine.forward(0, torch.ones(1, HIDDEN, device="cuda:1"), routing)
        devices = {event.device for _, *events in engine._times for event in events}
    assert devices == {torch.device("cuda:1")}


def test_a_prompt_takes_the_tiles_of_one_layers_experts(layout, monkeypatch):
    engine, launched = ResidentEngine.of_pages(layout, pages(), "cuda"), []
    monkeypatch.setattr(Launch, "run", lambda launch: launched.append(launch.constants))
    ids = torch.arange(128).remainder(EXPERTS).view(1, 64, 2)
    engine.forward(0, torch.ones(64, HIDDEN, device="cuda"), Routing.all_hits(ids))
    expected = prefill_tiles(ids.numel(), EXPERTS, 32, HIDDEN, torch.float32).block_m
    assert {constants["BLOCK_M"] for constants in launched if "BLOCK_M" in constants} == {expected}
