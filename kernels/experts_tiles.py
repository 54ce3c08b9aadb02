"""Tile sizes of the experts kernels: pure functions of the shapes, so that a test can ask them without a GPU."""

from dataclasses import dataclass

import torch

DECODE_PAIRS = 64
"""Pairs of token and expert up to which matrix-vector products win: beyond, tokens share weights."""


@dataclass(frozen=True)
class DecodeTiles:
    """One launch of the decode path: a program computes ``block_n`` outputs, ``block_k`` stored elements at a time.

    Args:
        warps: warps of a program.
        stages: depth of the load pipeline.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class PrefillTiles:
    """One launch of the prefill path: ``block_m`` pairs by ``block_n`` outputs, ``block_k`` inputs at a time."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def _power_of_two(value: int) -> int:
    """The least power of two that is not below ``value``."""
    return 1 << max(value - 1, 0).bit_length()


def decode_tiles(dtype: torch.dtype, outputs: int, length: int, matrices: int) -> DecodeTiles:
    """Tiles of about 8 KiB of weights, 64 bytes a thread of four warps, whatever the number of matrices side by side.

    Of int4 and int2, which lie in words, a tile holds whole groups: these have 16 words at most.

    Args:
        dtype: of the stored weights.
        outputs: rows of each matrix.
        length: stored elements of a row.
        matrices: rows that one output needs: gate and up, or the experts of a token (a power of two).
    """
    elements = 8192 // dtype.itemsize
    # A warp reads at least 128 consecutive bytes of a row, a thread 16.
    block_n = max(1, min(8, 64 // matrices))
    block_k = max(16, min(elements // (matrices * block_n), _power_of_two(length)))  # a thread's 16 bytes at least
    return DecodeTiles(min(block_n, _power_of_two(outputs)), block_k, 4, 3)


def prefill_tiles(pairs: int, slots: int, outputs: int, length: int, dtype: torch.dtype) -> PrefillTiles:
    """Tiles for ``pairs`` spread over at most ``slots`` experts.

    Args:
        outputs: rows of each matrix.
        length: inputs of each row.
        dtype: of the tokens; float32 products take no tensor cores but registers, and so small tiles.
    """
    largest = 32 if dtype == torch.float32 else 64
    each = pairs // max(1, min(pairs, slots))
    block_m = min(largest, max(16, _power_of_two(each)))
    block_n = min(largest, max(16, _power_of_two(outputs)))
    block_k = min(largest, max(16, _power_of_two(length)))
    return PrefillTiles(block_m, block_n, block_k, 4, 3)
