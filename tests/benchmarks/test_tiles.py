"""Other tiles of the decode kernels: they compute the same, and are worth a trial."""

import pytest
import torch

from cachemoe.benchmarks.tiles import LAUNCHES, TRIED, meta_launches, neighbours, retiled, tile_cases, tiles_of, title
from cachemoe.kernels.experts_decode import plan_decode
from cachemoe.kernels.experts_tiles import DecodeTiles
from cachemoe.kernels.formats import PageFormat

pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_neighbours_are_distinct_and_begin_with_the_tiles_themselves():
    tiles = DecodeTiles(8, 256, 4, 3)
    found = neighbours(tiles, least_k=16)
    assert found[0] == tiles
    assert len(found) == len(set(found)) == 12
    assert {DecodeTiles(8, 256, 4, 5), DecodeTiles(16, 128, 4, 3), DecodeTiles(4, 256, 2, 3)} < set(found)


def test_no_neighbour_is_smaller_than_the_kernel_takes():
    for tiles in neighbours(DecodeTiles(1, 16, 1, 3), least_k=16):
        assert tiles.block_n >= 1 and tiles.block_k >= 16 and tiles.warps >= 1


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize(
    "page_format", [PageFormat("bf16", 512, 192), PageFormat("int4", 576, 192, 64, bias=True)], ids=lambda f: f.kind
)
def test_whatever_the_tiles_the_result_is_the_same(page_format, name):
    torch.manual_seed(0)
    matrices = torch.randn(384, page_format.hidden) * 0.05, torch.randn(page_format.hidden, 192) * 0.1
    biases = [torch.randn(384), torch.randn(page_format.hidden)] if page_format.bias else []
    pool = torch.stack([page_format.pack(*matrices, *biases)] * 3).to(DEVICE)
    x, out = torch.randn(1, page_format.hidden, device=DEVICE), torch.zeros(1, page_format.hidden, device=DEVICE)
    slots, h = torch.tensor([[2, 0]], device=DEVICE), torch.zeros(2, 192, device=DEVICE)
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


def test_what_is_compiled_is_what_is_tried():
    assert len(list(tile_cases())) == sum(
        len(retiled(launch)) for geometry, kind in TRIED for launch in meta_launches(geometry, kind).values()
    )
    names = [what for what, _ in tile_cases()]
    assert any("Mixtral-8x7B, int4, " + title(DecodeTiles(8, 128, 4, 3)) == what for what in names)
    assert {tiles_of(launch).stages for _, launch in tile_cases()} == {2, 3, 4, 5}
