"""Experts for many tokens: pairs of token and expert grouped by slot, then matrix products in tiles of one slot.

Weights are read in place, without padded copies; tokens are gathered as they are read. ``gate_up`` writes
act(gate(x)) * up(x) for each pair, ``down`` each pair's result in float32, ``combine`` their sum weighted by the gates.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from cachemoe.kernels.activations_gpu import activate_tile
from cachemoe.kernels.experts_decode import as_words, two_floats
from cachemoe.kernels.experts_tiles import PrefillTiles, prefill_tiles
from cachemoe.kernels.formats import PageFormat
from cachemoe.kernels.launch import Launch


@triton.jit
def _weight_tile(
    weight,  # pointer to the slot's matrix
    scales,  # pointer to its scales, as words of a scale and a zero (int4, int2)
    row,  # [N] rows of the matrix
    live,  # [N]
    first,  # first input
    length,  # inputs of a row
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    FLOAT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_K, N] in FLOAT: a tile of the matrix, transposed; int8 before its scales."""
    row = row.to(tl.int64)
    if GROUP:
        VALUES: tl.constexpr = 8 // BITS  # in a byte
        k = first // VALUES + tl.arange(0, BLOCK_K // VALUES)
        at = weight + row[:, None] * (length // VALUES) + k[None, :]
        packed = tl.load(at, live[:, None] & (k < length // VALUES)[None, :], 0).to(tl.int32)
        q = tl.join(packed & 15, packed >> 4)
        if BITS == 2:
            q = tl.join(q & 3, q >> 2)
        GROUPS: tl.constexpr = max(1, BLOCK_K // GROUP)
        q = tl.reshape(q, [row.shape[0], GROUPS, BLOCK_K // GROUPS]).to(tl.float32)
        g = first // GROUP + tl.arange(0, GROUPS)
        at = scales + row[:, None] * (length // GROUP) + g[None, :]
        words = tl.load(at, live[:, None] & (g < length // GROUP)[None, :], 0)
        scale, zero = two_floats(words, tl.bfloat16)
        w = tl.reshape((q - 2.0 ** (BITS - 1)) * scale[:, :, None] + zero[:, :, None], [row.shape[0], BLOCK_K])
    else:
        k = first + tl.arange(0, BLOCK_K)
        w = tl.load(weight + row[:, None] * length + k[None, :], live[:, None] & (k < length)[None, :], 0)
        if w.dtype != FLOAT:
            w = w.to(tl.float32)
    return tl.trans(w.to(FLOAT))


@triton.jit
def _grouped_kernel(
    a_ptr,  # gate_up: x [T, H]; down: h [T * K, I]
    order_ptr,  # [T * K] int64, pairs by slot
    tile_slot_ptr,  # [tiles] int64, the slot of each tile, SLOTS for none
    tile_first_ptr,  # [tiles] int64, where its pairs begin in order
    slot_end_ptr,  # [SLOTS] int64, where the slot's pairs end
    weight_ptr,
    scales_ptr,
    bias_ptr,
    y_ptr,  # gate_up: h [T * K, I]; down: [T * K, H] float32.  output
    weight_stride,  # elements from a slot to the next
    scales_stride,
    bias_stride,
    length,  # inputs of a row: H or I
    outputs,  # of a pair: I or H
    K,
    SLOTS,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GATE_UP: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One of the two matrix products. Grid: (tiles of pairs, blocks of outputs): a slot's tiles meet in the cache."""
    tile = tl.program_id(0)
    slot = tl.load(tile_slot_ptr + tile)
    if slot == SLOTS:
        return
    FLOAT: tl.constexpr = a_ptr.dtype.element_ty
    TWO: tl.constexpr = GATE_UP and GATED
    m = tl.load(tile_first_ptr + tile) + tl.arange(0, BLOCK_M)
    here = m < tl.load(slot_end_ptr + slot)
    pair = tl.load(order_ptr + m, here, 0)
    a_row = a_ptr + (pair // K if GATE_UP else pair)[:, None] * length
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < outputs
    gate_row = 2 * n if INTERLEAVED else n
    up_row = 2 * n + 1 if INTERLEAVED else n + outputs
    weight = weight_ptr + slot * weight_stride
    scales = scales_ptr + slot * scales_stride if scales_ptr is not None else weight
    only = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    row = gate_row if TWO else n
    for first in range(0, length, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a = tl.load(a_row + k[None, :], here[:, None] & (k < length)[None, :], 0)
        w = _weight_tile(weight, scales, row, live, first, length, BITS, GROUP, FLOAT, BLOCK_K)
        only = tl.dot(a, w, only, input_precision="ieee")
        if TWO:
            w = _weight_tile(weight, scales, up_row, live, first, length, BITS, GROUP, FLOAT, BLOCK_K)
            up = tl.dot(a, w, up, input_precision="ieee")
    if BITS == 8:
        only *= tl.load(scales + row, live, 0.0)[None, :]
        if TWO:
            up *= tl.load(scales + up_row, live, 0.0)[None, :]
    if bias_ptr is not None:
        bias = bias_ptr + slot * bias_stride
        only += tl.load(bias + row, live, 0.0)[None, :]
        if TWO:
            up += tl.load(bias + up_row, live, 0.0)[None, :]
    if GATE_UP:
        only = activate_tile(only, up if GATED else only, ACTIVATION, GATED)
    at = y_ptr + pair[:, None] * outputs + n[None, :]
    tl.store(at, only.to(y_ptr.dtype.element_ty), here[:, None] & live[None, :])


@triton.jit
def _combine_kernel(
    pairs_ptr,  # [T, K, H] float32
    slots_ptr,  # [T, K] int64
    gates_ptr,  # [T, K] float32
    y_ptr,  # [T, H]  output
    H,
    K,
    PADDED_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y[t] = sum over k of gates[t, k] * pairs[t, k]. Grid: (T, blocks of H)."""
    k = tl.arange(0, PADDED_K)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(0).to(tl.int64)
    pair = token * K + k
    kept = tl.load(slots_ptr + pair, k < K, -1) >= 0
    results = tl.load(pairs_ptr + pair[:, None] * H + n[None, :], kept[:, None] & (n < H)[None, :], 0.0)
    y = tl.sum(results * tl.load(gates_ptr + pair, kept, 0.0)[:, None], 0)
    tl.store(y_ptr + token * H + n, y.to(y_ptr.dtype.element_ty), n < H)


def group_by_slot(
    slots: torch.Tensor, pending: torch.Tensor | None, count: int, block_m: int, most: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs by slot, cut into tiles that hold one slot's pairs each; no transfer to the host.

    Args:
        slots: ``[T, K]`` int64; -1 takes no part.
        pending: ``[T, K]`` bool, pairs that take part; None: all.
        count: slots there are.
        block_m: pairs of a tile.
        most: pairs that take part, and slots that they have, at most.

    Returns:
        int64 tensors: ``order`` ``[T * K]`` pairs by slot, each slot's in the order of ``slots``; ``tile_slot``
        and ``tile_first`` ``[tiles]``, each tile's slot (``count`` for none) and first place in ``order``; ``slot_end``
        ``[count]``, where each slot's pairs end in ``order``. ``tiles`` is the most that any routing within ``most``
        could need.
    """
    most_pairs, most_slots = most
    taking_part = slots >= 0 if pending is None else pending & (slots >= 0)
    flat = torch.where(taking_part, slots, count).flatten()
    by_slot, order = flat.sort(stable=True)
    ends = torch.searchsorted(by_slot, torch.arange(count, device=flat.device), right=True)
    begins = torch.cat((ends.new_zeros(1), ends[:-1]))
    tiles_end = ((ends - begins + block_m - 1) // block_m).cumsum(0)
    tile = torch.arange(most_pairs // block_m + min(most_slots, most_pairs), device=flat.device)
    tile_slot = torch.searchsorted(tiles_end, tile, right=True)
    known = tile_slot.clamp(max=count - 1)
    tiles_begin = torch.cat((tiles_end.new_zeros(1), tiles_end[:-1]))
    return order, tile_slot, begins[known] + (tile - tiles_begin[known]) * block_m, ends


def plan_prefill(
    x: torch.Tensor,
    slots: torch.Tensor,
    gates: torch.Tensor,
    weights: dict[str, torch.Tensor],
    page_format: PageFormat,
    out: torch.Tensor,
    h: torch.Tensor,
    pairs: torch.Tensor,
    pending: torch.Tensor | None = None,
    finish: bool = True,
    among: int | None = None,
    most: Sequence[int] | None = None,
    tiles: Sequence[PrefillTiles] = (),
) -> list[Launch]:
    """The launches. Arguments as ``cachemoe.kernels.experts.experts``; of no pairs there is nothing but the sum.

    ``h`` is scratch ``[T * K, I]`` in x's dtype, ``pairs`` ``[T, K, H]`` float32 takes each pair's result. ``tiles`` of
    the two products; none: what ``prefill_tiles`` chooses.

    Raises:
        ValueError: if the two products' tiles differ in ``block_m``: pairs are grouped once.
    """
    if len({size.block_m for size in tiles}) > 1:
        raise ValueError(f"pairs are grouped once for both products, and not by {tiles}")
    (tokens, top_k), count = slots.shape, weights["gate_up"].shape[0]
    among = count if among is None else among
    most = most or (slots.numel(), among)
    # Left to itself the assembler would spill to fit more programs: products without tensor cores, values taken apart.
    limit = 255 if x.dtype == torch.float32 or page_format.group else None
    launches = []
    for product, (name, a, y) in enumerate((("gate_up", x, h), ("down", h, pairs)) if most[0] else ()):
        weight, scales, bias = (weights.get(name + part) for part in ("", "_scales", "_bias"))
        if page_format.group:
            scales = as_words(scales)
        size = tiles[product] if tiles else prefill_tiles(slots.numel(), among, y.shape[-1], a.shape[-1], x.dtype)
        if not launches:
            grouping = group_by_slot(slots, pending, count, size.block_m, most)
        order, tile_slot, tile_first, slot_end = grouping
        arguments = {
            "a_ptr": a,
            "order_ptr": order,
            "tile_slot_ptr": tile_slot,
            "tile_first_ptr": tile_first,
            "slot_end_ptr": slot_end,
            "weight_ptr": weight,
            "scales_ptr": scales,
            "bias_ptr": bias,
            "y_ptr": y,
            "weight_stride": weight.stride(0),
            "scales_stride": 0 if scales is None else scales.stride(0),
            "bias_stride": 0 if bias is None else bias.stride(0),
            "length": a.shape[-1],
            "outputs": y.shape[-1],
            "K": top_k,
            "SLOTS": count,
        }
        constants = {
            "BITS": page_format.bits,
            "GROUP": page_format.group,
            "GATE_UP": name == "gate_up",
            "GATED": page_format.gated,
            "ACTIVATION": page_format.activation,
            "INTERLEAVED": page_format.interleaved,
            "BLOCK_M": size.block_m,
            "BLOCK_N": size.block_n,
            "BLOCK_K": size.block_k,
        }
        grid = (tile_slot.shape[0], triton.cdiv(y.shape[-1], size.block_n))
        launches.append(
            Launch(_grouped_kernel, grid, arguments, constants, size.warps, size.stages, True, size.stages > 1, limit)
        )
    if finish:
        hidden, block_n = page_format.hidden, 256
        arguments = {"pairs_ptr": pairs, "slots_ptr": slots, "gates_ptr": gates, "y_ptr": out, "H": hidden, "K": top_k}
        constants = {"PADDED_K": triton.next_power_of_2(top_k), "BLOCK_N": block_n}
        launches.append(Launch(_combine_kernel, (tokens, triton.cdiv(hidden, block_n)), arguments, constants))
    return launches
