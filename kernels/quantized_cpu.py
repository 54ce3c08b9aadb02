"""int8, int4 and int2 pages times a few tokens on the CPU, in C: at the speed at which memory gives the weights.

torch's own int4 matmul for CPUs reaches half of it, since arithmetic binds it, and wants a packing of its own.
"""

import ctypes
import warnings
from functools import cache
from pathlib import Path

import torch

from cachemoe.kernels.compile_c import compile_c
from cachemoe.kernels.formats import PageFormat

_SOURCE = Path(__file__).with_suffix(".c")
_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


def linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, slots: torch.Tensor, page_format: PageFormat
) -> torch.Tensor:
    """Each slot's matrix times its tokens. Needs ``has_c()``.

    Args:
        x: ``[J, T, columns]`` contiguous float32 or bfloat16, or ``[1, T, columns]`` for tokens that all slots share.
        weight, scales: one matrix of int8, int4 or int2 pages, ``[S, ...]``, strided by slot.
        slots: ``[J]`` int64.
        page_format: layout of the pages.

    Returns:
        ``[J, T, rows]`` float32, each reduced in an order that depends on nothing else in the call.
    """
    (jobs,), (shared, tokens, columns), rows = slots.shape, x.shape, weight.shape[1]
    bits = page_format.bits
    y = torch.empty(jobs, tokens, rows, dtype=torch.float32, device="cpu")
    scratch = torch.empty(_c().scratch_bytes(bits, columns) * shared * tokens, dtype=torch.uint8, device="cpu")
    _c().linear(
        *(bits, page_format.group, x.dtype == torch.bfloat16, x.data_ptr(), shared == 1),
        *(weight.data_ptr(), weight.stride(0), scales.data_ptr(), scales.stride(0) * scales.element_size()),
        *(slots.data_ptr(), jobs, tokens, rows, columns, scratch.data_ptr(), y.data_ptr()),
    )
    return y


def unpack(weight: torch.Tensor, scales: torch.Tensor, page_format: PageFormat, dtype: torch.dtype) -> torch.Tensor:
    """One matrix of an int8, int4 or int2 page as numbers. Needs ``has_c()``.

    Args:
        weight, scales: of one slot.
        page_format: layout of the page.
        dtype: float32, or bfloat16 to round to.

    Returns:
        ``[rows, columns]`` in that dtype, exactly ``PageFormat.dequantized`` rounded.
    """
    bits, (rows, row_bytes) = page_format.bits, weight.shape
    out = torch.empty(rows, row_bytes * 8 // bits, dtype=dtype, device="cpu")
    settings = bits, page_format.group, dtype == torch.bfloat16
    _c().unpack(*settings, weight.data_ptr(), scales.data_ptr(), *out.shape, out.data_ptr())
    return out


@cache
def has_c() -> bool:
    """Whether the C could be compiled; warns once where it could not."""
    try:
        _c()
    except (OSError, AttributeError) as error:  # the latter if $CC makes something else of the source
        warnings.warn(
            f"int8, int4 and int2 pages are taken apart at every call, which is slow: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


@cache
def _c() -> ctypes.CDLL:
    library = compile_c(_SOURCE)
    library.linear.argtypes = (
        *(_INT, _INT, _INT, _POINTER, _INT),
        *(_POINTER, _LONG, _POINTER, _LONG),
        *(_POINTER, _LONG, _LONG, _LONG, _LONG, _POINTER, _POINTER),
    )
    library.linear.restype = None
    library.scratch_bytes.argtypes, library.scratch_bytes.restype = (_INT, _LONG), _LONG
    library.unpack.argtypes = (_INT, _LONG, _INT, _POINTER, _POINTER, _LONG, _LONG, _POINTER)
    library.unpack.restype = None
    return library
