"""Tile sizes: whatever the shape, they fit it and the machine."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachemoe.kernels.experts_tiles import decode_tiles, prefill_tiles
from cachemoe.kernels.formats import GROUPED, GROUPS

sizes = st.integers(1, 20000)


def is_power_of_two(n):
    return n > 0 and n & (n - 1) == 0


@given(st.sampled_from([torch.bfloat16, torch.int8, torch.int32]), sizes, sizes, st.sampled_from([1, 2, 4, 8, 16]))
def test_decode_tiles_are_powers_of_two_of_bounded_size(dtype, outputs, length, matrices):
    tiles = decode_tiles(dtype, outputs, length, matrices)
    assert is_power_of_two(tiles.block_n) and is_power_of_two(tiles.block_k)
    assert tiles.block_k * dtype.itemsize >= 16  # a thread's load
    assert tiles.block_n * tiles.block_k * matrices * dtype.itemsize <= 16384
    assert tiles.block_n < 2 * outputs


@given(st.sampled_from(list(GROUPED.values())), st.sampled_from(GROUPS), sizes, st.integers(1, 200))
def test_a_tile_holds_whole_groups(bits, group, outputs, groups):
    words = group * bits // 32
    tiles = decode_tiles(torch.int32, outputs, groups * words, 4)
    assert tiles.block_k % words == 0


@pytest.mark.parametrize(
    "hidden, intermediate, top_k", [(2048, 768, 8), (2048, 1024, 8), (2048, 1408, 4), (2880, 2880, 4), (4096, 14336, 2)]
)
@pytest.mark.parametrize("dtype, values", [(torch.bfloat16, 1), (torch.int8, 1), (torch.int32, 8), (torch.int32, 16)])
def test_one_token_keeps_132_multiprocessors_busy(hidden, intermediate, top_k, dtype, values):
    gate_up = decode_tiles(dtype, intermediate, hidden // values, 2)
    down = decode_tiles(dtype, hidden, intermediate // values, top_k)
    assert top_k * intermediate / gate_up.block_n >= 2 * 132
    assert hidden / down.block_n >= 132


@given(sizes, st.integers(1, 512), sizes, sizes, st.sampled_from([torch.bfloat16, torch.float32]))
def test_prefill_tiles_are_what_tensor_cores_take(pairs, slots, outputs, length, dtype):
    tiles = prefill_tiles(pairs, slots, outputs, length, dtype)
    for size in (tiles.block_m, tiles.block_n, tiles.block_k):
        assert is_power_of_two(size) and 16 <= size <= 128


def test_prefill_tiles_grow_with_the_pairs_of_an_expert():
    heights = [
        prefill_tiles(pairs, 64, 2048, 2048, torch.bfloat16).block_m for pairs in (64, 64 * 20, 64 * 50, 64 * 500)
    ]
    assert heights == sorted(heights) and heights[0] == 16 < heights[-1]
