"""int8, int4 and int2 pages times a few tokens on the CPU, in C: at the speed at which memory gives the weights.

torch's own int4 matmul for CPUs reaches half of it, since arithmetic binds it, and wants a packing of its own.
"""

import ctypes
import warnings
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import chain
from pathlib import Path

import torch

from cachemoe.kernels.compile_c import compile_c, why_not
from cachemoe.kernels.formats import ACTIVATIONS, PageFormat
from cachemoe.kernels.quantize import unpack_matrix

_SOURCE = Path(__file__).with_suffix(".c")
DTYPES = torch.bfloat16, torch.float32  # that the C knows, of x
_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


def unpack(weight: torch.Tensor, scales: torch.Tensor, bits: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """One matrix of an int8, int4 or int2 page as numbers. Needs ``has_c()``.

    Args:
        weight, scales: of one slot.
        bits, group: of the page's format.
        dtype: float32, or bfloat16 to round to.

    Returns:
        ``[rows, columns]`` in that dtype, exactly ``PageFormat.dequantized`` rounded.
    """
    rows, row_bytes = weight.shape
    out = torch.empty(rows, row_bytes * 8 // bits, dtype=dtype, device="cpu")
    settings = bits, group, dtype == torch.bfloat16
    library().unpack(*settings, weight.data_ptr(), scales.data_ptr(), *out.shape, out.data_ptr())
    return out


def numbers(weight: torch.Tensor, scales: torch.Tensor, bits: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """As ``unpack``, with or without C, in any floating point dtype."""
    if has_c() and dtype in DTYPES:
        return unpack(weight, scales, bits, group, dtype)
    warn_without_c()
    return unpack_matrix(weight, scales, bits).to(dtype)


def experts(
    x: torch.Tensor, weights: dict[str, torch.Tensor], slots: torch.Tensor, page_format: PageFormat
) -> torch.Tensor:
    """As ``experts_cpu.side_by_side``, of int8, int4 or int2 pages. Needs ``has_c()``.

    Args:
        x: ``[n, H]`` contiguous float32 or bfloat16.
    """
    (jobs,), (tokens, hidden) = slots.shape, x.shape
    y = torch.empty(jobs, tokens, hidden, dtype=torch.float32, device="cpu")
    _experts(x, weights, slots.tolist(), [range(tokens)] * jobs, page_format, y)
    return y


def pairs(
    x: torch.Tensor, weights: dict[str, torch.Tensor], slots: list[list[int]], page_format: PageFormat
) -> torch.Tensor:
    """A few tokens' experts of int8, int4 or int2 pages, each read once for all that use it. Needs ``has_c()``.

    Args:
        x: ``[T, H]`` contiguous float32 or bfloat16.
        slots: K of each token; below 0 for none.

    Returns:
        ``[T, K, H]`` float32, 0 where there is no slot.
    """
    places: dict[int, list[tuple[int, int]]] = {}
    for token, row in enumerate(slots):
        for k, slot in enumerate(row):
            if slot >= 0:
                places.setdefault(slot, []).append((token, k))
    out = torch.zeros(len(slots), len(slots[0]), x.shape[1], dtype=torch.float32, device="cpu")
    if not places:
        return out
    order = [place for each in places.values() for place in each]
    y = torch.empty(len(order), x.shape[1], dtype=torch.float32, device="cpu")
    _experts(x, weights, list(places), [[token for token, _ in each] for each in places.values()], page_format, y)
    out[tuple(zip(*order, strict=True))] = y
    return out


def token(
    x: torch.Tensor,
    weights: dict[str, torch.Tensor],
    slots: list[int],
    gates: list[float],
    page_format: PageFormat,
    out: torch.Tensor,
) -> None:
    """One token's experts of int8, int4 or int2 pages, weighed and summed in their order. Needs ``has_c()``.

    Args:
        x: ``[1, H]`` contiguous float32 or bfloat16, as is ``out``.
        slots, gates: of K experts.
    """
    k, pages = len(slots), pages_of(weights, page_format)
    size = token_scratch_bytes(pages, k)
    scratch = torch.empty(size + 4 * k * x.shape[1], dtype=torch.uint8, device="cpu")
    at = scratch.data_ptr()
    where, gates = (_LONG * k)(*slots), (ctypes.c_float * k)(*gates)
    library().token(pages, x.dtype == torch.bfloat16, x.data_ptr(), where, gates, k, at, at + size, out.data_ptr())


def some(
    x: torch.Tensor, weights: dict[str, torch.Tensor], slots: list[int], page_format: PageFormat, pairs: torch.Tensor
) -> None:
    """Some of a token's experts of int8, int4 or int2 pages. Needs ``has_c()``.

    Args:
        x: as for ``token``.
        slots: of n experts.
        pairs: ``[n, H]`` float32 contiguous, to be filled in.
    """
    _experts(x, weights, slots, [(0,)] * len(slots), page_format, pairs)


def _experts(x, weights, slots: list[int], tokens: Sequence[Sequence[int]], page_format, y) -> None:
    """Into ``y`` ``[n, H]`` the output of each slot's expert for each of its tokens, slot by slot."""
    jobs, counts, of = len(slots), [*map(len, tokens)], [*chain(*tokens)]
    pages = pages_of(weights, page_format)
    size = library().experts_scratch_bytes(pages, len(of), len(x))
    scratch = torch.empty(size, dtype=torch.uint8, device="cpu")
    lists = (_LONG * jobs)(*slots), (_LONG * jobs)(*counts), jobs, (_LONG * len(of))(*of)
    pointers = x.data_ptr(), len(x), *lists, scratch.data_ptr(), y.data_ptr()
    library().experts(pages, x.dtype == torch.bfloat16, *pointers)


def weigh(gates: list[float], pairs: torch.Tensor, rows: list[int], out: torch.Tensor) -> None:
    """``out`` ``[1, H]`` float32 or bfloat16 as ``token`` sums.

    Args:
        gates: of K experts.
        pairs: ``[K, H]`` float32 contiguous, their outputs.
        rows: where among the pairs each expert's is.
    """
    k, hidden = len(gates), pairs.shape[1]
    pointers = (ctypes.c_float * k)(*gates), pairs.data_ptr(), (_LONG * k)(*rows)
    library().weigh(*pointers, k, hidden, out.dtype == torch.bfloat16, out.data_ptr())


def linear(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """One matrix times tokens. Needs ``has_c()``.

    Args:
        x: ``[T, columns]`` contiguous float32 or bfloat16.
        weight, scales: of one slot.
        bits, group: of the page's format.

    Returns:
        ``[T, rows]`` float32, each reduced in an order that depends on nothing else in the call.
    """
    (tokens, columns), rows = x.shape, weight.shape[0]
    y = torch.empty(tokens, rows, dtype=torch.float32, device="cpu")
    scratch = torch.empty(library().scratch_bytes(bits, columns) * tokens, dtype=torch.uint8, device="cpu")
    pointers = x.data_ptr(), matrix_of(weight, scales, bits), tokens, scratch.data_ptr(), y.data_ptr()
    library().linear(bits, group, x.dtype == torch.bfloat16, *pointers)
    return y


class Matrix(ctypes.Structure):
    """One of the matrices of pages, strided by slot; strides in bytes."""

    _fields_ = (
        *(("packed", _POINTER), ("packed_stride", _LONG), ("scales", _POINTER), ("scales_stride", _LONG)),
        *(("bias", _POINTER), ("bias_stride", _LONG), ("rows", _LONG), ("columns", _LONG)),
    )


def matrix_of(weight: torch.Tensor, scales: torch.Tensor, bits: int, bias: torch.Tensor | None = None) -> Matrix:
    """Of one slot: ``[rows, bytes]``, its scales and its bias."""
    at, (rows, row_bytes) = None if bias is None else bias.data_ptr(), weight.shape
    return Matrix(weight.data_ptr(), 0, scales.data_ptr(), 0, at, 0, rows, row_bytes * 8 // bits)


class _Pages(ctypes.Structure):
    _fields_ = (
        *(("gate_up", Matrix), ("down", Matrix)),
        *((name, _INT) for name in ("bits", "group", "gated", "interleaved", "activation")),
    )


def pages_of(weights: dict[str, torch.Tensor], page_format: PageFormat) -> "_Pages":
    """What the C has to know of pages ``[F, ...]``."""
    return _pages(page_format.encoded, tuple((each.data_ptr(), each.stride(0)) for each in weights.values()))


def token_scratch_bytes(pages: "_Pages", k: int) -> int:
    """What ``token`` of K experts needs beside them."""
    return library().experts_scratch_bytes(pages, k, 1)


@lru_cache(maxsize=64)
def _pages(encoded: str, memory: tuple[tuple[int, int], ...]) -> _Pages:
    """What the C has to know of pages whose parts lie in that memory, (address, elements from slot to slot) each."""
    page_format = PageFormat.decode(encoded)
    fields, sizes = {}, {}
    for (name, _, _, dtype, shape), (address, stride) in zip(page_format.parts, memory, strict=True):
        fields[name] = address, stride * dtype.itemsize
        sizes[name] = shape
    matrices = []
    for name in ("gate_up", "down"):
        parts = (fields.get(name + end, (None, 0)) for end in ("", "_scales", "_bias"))
        rows, row_bytes = sizes[name]
        matrices.append(Matrix(*(each for part in parts for each in part), rows, row_bytes * 8 // page_format.bits))
    how = page_format.group, page_format.gated, page_format.interleaved, ACTIVATIONS.index(page_format.activation)
    return _Pages(*matrices, page_format.bits, *how)


@cache
def has_c() -> bool:
    """Whether the C could be compiled."""
    return why_not(library) is None


@cache
def warn_without_c() -> None:
    """Say once why quantised pages are slow here, where the C could not be compiled."""
    if (why := why_not(library)) is not None:
        warnings.warn(
            f"int8, int4 and int2 matrices are taken apart at every call, which is slow: {why}",
            RuntimeWarning,
            stacklevel=2,
        )


@cache
def library() -> ctypes.CDLL:
    compiled = compile_c(_SOURCE)
    compiled.linear.argtypes = (
        *(_INT, _INT, _INT, _POINTER),
        *(ctypes.POINTER(Matrix), _LONG, _POINTER, _POINTER),
    )
    compiled.linear.restype = compiled.experts.restype = compiled.token.restype = compiled.weigh.restype = None
    pages = ctypes.POINTER(_Pages)
    compiled.token.argtypes = pages, _INT, *(_POINTER,) * 3, _LONG, *(_POINTER,) * 3
    compiled.weigh.argtypes = *(_POINTER,) * 3, _LONG, _LONG, _INT, _POINTER
    compiled.experts.argtypes = pages, _INT, _POINTER, _LONG, _POINTER, _POINTER, _LONG, *(_POINTER,) * 3
    compiled.experts_scratch_bytes.argtypes, compiled.experts_scratch_bytes.restype = (pages, _LONG, _LONG), _LONG
    compiled.scratch_bytes.argtypes, compiled.scratch_bytes.restype = (_INT, _LONG), _LONG
    compiled.unpack.argtypes = (_INT, _LONG, _INT, _POINTER, _POINTER, _LONG, _LONG, _POINTER)
    compiled.unpack.restype = None
    return compiled
