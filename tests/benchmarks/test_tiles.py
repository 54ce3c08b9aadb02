"""The experts' kernels with other tiles: they compute the same."""

import pytest
import torch

from cachemoe.benchmarks import micro_bench_tiles
from cachemoe.benchmarks.geometries import GEOMETRIES
from cachemoe.benchmarks.tiles import (
    LAUNCHES,
    PREFILL_TRIED,
    PROMPTS,
    TRIED,
    meta_launches,
    neighbours,
    prefill_title,
    retiled,
    tile_cases,
    tiles_of,
    title,
)
from cachemoe.kernels.experts_decode import plan_decode
from cachemoe.kernels.experts_prefill import plan_prefill
from cachemoe.kernels.experts_tiles import DecodeTiles, PrefillTiles
from cachemoe.kernels.formats import PageFormat

pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_neighbours_are_distinct_and_begin_with_the_tiles_themselves():
    tiles = DecodeTiles(8, 256, 4, 3)
    found = neighbours(tiles, least_k=16)
    assert found[0] == tiles
    assert len(found) == len(set(found)) == 13
    assert {DecodeTiles(8, 256, 4, 5), DecodeTiles(16, 128, 4, 3), DecodeTiles(4, 256, 2, 3)} < set(found)


def test_no_neighbour_is_smaller_than_the_kernel_takes():
    for tiles in neighbours(DecodeTiles(1, 16, 1, 3), least_k=16):
        assert tiles.block_n >= 1 and tiles.block_k >= 16 and tiles.warps >= 1


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize(
    "page_format",
    [PageFormat("bf16", 256, 96), PageFormat("int4", 320, 64, 64, bias=True), PageFormat("int2", 320, 64, 32)],
    ids=lambda f: f.kind,
)
def test_whatever_the_tiles_the_result_is_the_same(page_format, name):
    torch.manual_seed(0)
    hidden, inner = page_format.hidden, page_format.intermediate
    matrices = torch.randn(2 * inner, hidden) * 0.05, torch.randn(hidden, inner) * 0.1
    biases = [torch.randn(2 * inner), torch.randn(hidden)] if page_format.bias else []
    pool = torch.stack([page_format.pack(*matrices, *biases)] * 3).to(DEVICE)
    x, out = torch.randn(1, hidden, device=DEVICE), torch.zeros(1, hidden, device=DEVICE)
    slots, h = torch.tensor([[2, 0]], device=DEVICE), torch.zeros(2, inner, device=DEVICE)
    planned = plan_decode(x, slots, torch.rand(1, 2, device=DEVICE), page_format.views(pool), page_format, out, h)
    planned[0].run()
    written = h if name == "gate_up" else out
    results = []
    for launch in retiled(planned[LAUNCHES.index(name)]):
        written.fill_(float("nan"))
        launch.run()
        results.append(written.clone())
    assert len(results) > 8
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4 * float(results[0].abs().max()))


def test_what_is_tried_has_been_compiled():
    compiled = [what for what, _ in tile_cases()]
    assert len(compiled) == len(set(compiled)) + len(PROMPTS) * len(PREFILL_TRIED) * 2  # a prompt has three launches
    launches = {tried: meta_launches(*tried) for tried in TRIED}
    for geometry, kind, name, _, place in (run.values for run in micro_bench_tiles.runs()):
        tiles = title(tiles_of(retiled(launches[geometry, kind][name])[place]))
        assert f"{GEOMETRIES[geometry].title}, {kind} {name}, {tiles}" in compiled
    for geometry in PROMPTS:
        for tiles in PREFILL_TRIED:
            assert f"{GEOMETRIES[geometry].title}, bf16, {prefill_title(tiles)}" in compiled


def test_products_of_a_prompt_are_grouped_alike():
    tiles = PrefillTiles(16, 64, 64, 4, 3), PrefillTiles(32, 64, 64, 4, 3)
    x, slots = torch.empty(40, 96, device="meta"), torch.empty(40, 2, dtype=torch.int64, device="meta")
    page_format = PageFormat("bf16", 96, 160)
    weights = page_format.views(torch.empty(3, page_format.page_bytes, dtype=torch.uint8, device="meta"))
    with pytest.raises(ValueError, match="grouped once"):
        plan_prefill(x, slots, slots.float(), weights, page_format, x, x, x, tiles=tiles)


@pytest.mark.parametrize("tiles", PREFILL_TRIED, ids=prefill_title)
def test_whatever_the_tiles_a_prompt_has_the_same_result(tiles):
    torch.manual_seed(0)
    page_format = PageFormat("fp16", 96, 160)
    pool = torch.stack([page_format.pack(torch.randn(320, 96) * 0.1, torch.randn(96, 160) * 0.1) for _ in range(3)]).to(
        DEVICE
    )
    x = torch.randn(40, 96, device=DEVICE, dtype=torch.float16)
    slots = torch.stack([torch.randperm(3)[:2] for _ in x]).to(DEVICE)
    gates = torch.rand(40, 2, device=DEVICE)

    def run(tiles):
        out, h = torch.full_like(x, float("nan")), x.new_full((80, 160), float("nan"))
        pairs = torch.full((40, 2, 96), float("nan"), device=DEVICE)
        weights = page_format.views(pool)
        for launch in plan_prefill(x, slots, gates, weights, page_format, out, h, pairs, tiles=tiles):
            launch.run()
        return out

    expected = run(())
    torch.testing.assert_close(run(tiles), expected, rtol=1e-2, atol=2e-3 * float(expected.abs().max()))
