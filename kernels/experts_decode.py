"""Experts for few pairs of token and expert: output-stationary matrix-vector products over slots, in two launches.

A program computes ``BLOCK_N`` outputs: it streams their rows through registers, reduces once and stores once. Nothing
is sorted, copied or added atomically. ``gate_up`` writes act(gate(x)) * up(x) for each pair; ``down`` holds the rows of
all K experts of a token side by side and sums them weighted by the gates.

With a ``source``, missing experts are read through: from their page in the store, which the device can read, and
written into their slot in the same pass.
"""

import torch
import triton
import triton.language as tl

from cachemoe.kernels.activations_gpu import activate_tile
from cachemoe.kernels.experts_tiles import decode_tiles
from cachemoe.kernels.formats import PageFormat
from cachemoe.kernels.launch import Launch


@triton.jit
def two_floats(words, FLOAT: tl.constexpr):
    """The two numbers in each word, lower address first, as float32: no shuffle between threads is needed."""
    if FLOAT == tl.bfloat16:  # a bfloat16 is the upper half of a float32
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
    elif FLOAT == tl.float16:
        low = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        low = words.to(tl.int32).to(tl.float32, bitcast=True)
        high = (words >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def _add_two(products, sums, eight, pair, BYTE: tl.constexpr, FLOAT: tl.constexpr):
    """``products`` and the values of a byte of each word times ``pair``'s two numbers, ``sums`` and the two numbers.

    Values stay where they are in the word: q from bit b on, read as the bits of a float32, is q * 2**(b - 149), while
    b <= 20. Numbers are scaled by 2**(80 - b), and every product is q * x / 2**69 without a conversion; nothing is lost
    for x of 2**-57 to 2**47.
    """
    even, odd = two_floats(pair, FLOAT)
    sums += even + odd
    if BYTE == 3:
        eight >>= 8
    PLACE: tl.constexpr = 8 * (2 if BYTE == 3 else BYTE)
    low = (eight & (15 << PLACE)).to(tl.float32, bitcast=True)
    high = (eight & (240 << PLACE)).to(tl.float32, bitcast=True)
    products += low * (even * 2.0 ** (80 - PLACE))[None, :, :]
    products += high * (odd * 2.0 ** (76 - PLACE))[None, :, :]
    return products, sums


@triton.jit
def _matvec(
    x_ptr,  # the vectors; as words of two elements where KIND is int4
    x_first,  # [P] where vector p begins, or [1], the same for all
    x_live,  # [P] or [1] bool, vectors to read; the others are 0
    rows,  # [N, P] pointers to the first element of each row
    scale_rows,  # [N, P] pointers to each row's scales, as words of a scale and a zero (int4)
    live,  # [N, P] bool, rows to read; the others give 0
    length,  # elements of a row; int4: words of eight values
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    FLOAT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    pool_rows,  # with READ_THROUGH: [N, P] pointers to where the rows belong in the pool,
    pool_scale_rows,
    missing,  # and [N, P] bool, rows that are to be written there
    READ_THROUGH: tl.constexpr,
):
    """[N, P] float32: row (n, p) times vector p, before int8's scales.

    Rows of the same vector lie along the first dimension, over which a thread repeats: it reads the vector once.
    """
    N: tl.constexpr = rows.shape[0]
    P: tl.constexpr = rows.shape[1]
    X: tl.constexpr = x_first.shape[0]
    # A thread sums what it loads at once, 16 bytes, so that few accumulators are live.
    AT_ONCE: tl.constexpr = 128 // rows.dtype.element_ty.primitive_bitwidth
    if KIND == "int4":
        GROUP_WORDS: tl.constexpr = GROUP // 8
        GROUPS: tl.constexpr = BLOCK_K // GROUP_WORDS
        PARTS: tl.constexpr = GROUP_WORDS // AT_ONCE
        total = tl.zeros([N, P, GROUPS, PARTS], tl.float32)
        for first in tl.range(0, length, BLOCK_K, num_stages=STAGES):
            k = first + tl.arange(0, BLOCK_K)
            inside = (k < length)[None, None, :] & live[:, :, None]
            eight = tl.load(rows[:, :, None] + k[None, None, :], inside, 0, eviction_policy="evict_first")
            if READ_THROUGH:
                tl.store(pool_rows[:, :, None] + k[None, None, :], eight, inside & missing[:, :, None])
            g = first // GROUP_WORDS + tl.arange(0, GROUPS)
            inside = (g < length // GROUP_WORDS)[None, None, :] & live[:, :, None]
            words = tl.load(scale_rows[:, :, None] + g[None, None, :], inside, 0)
            if READ_THROUGH:
                tl.store(pool_scale_rows[:, :, None] + g[None, None, :], words, inside & missing[:, :, None])
            inside = (k < length)[None, :] & x_live[:, None]
            at = x_ptr + 4 * (x_first[:, None] + k[None, :])
            byte_0, byte_1 = tl.load(at, inside, 0), tl.load(at + 1, inside, 0)
            byte_2, byte_3 = tl.load(at + 2, inside, 0), tl.load(at + 3, inside, 0)
            products, sums = tl.zeros([N, P, BLOCK_K], tl.float32), tl.zeros([X, BLOCK_K], tl.float32)
            products, sums = _add_two(products, sums, eight, byte_0, 0, FLOAT)
            products, sums = _add_two(products, sums, eight, byte_1, 1, FLOAT)
            products, sums = _add_two(products, sums, eight, byte_2, 2, FLOAT)
            products, sums = _add_two(products, sums, eight, byte_3, 3, FLOAT)
            dot = tl.sum(tl.reshape(products, [N, P, GROUPS, PARTS, AT_ONCE]), 4) * 2.0**69
            sum_x = tl.sum(tl.reshape(sums, [X, GROUPS, PARTS, AT_ONCE]), 3)
            scale, zero = two_floats(words, tl.bfloat16)
            total += scale[:, :, :, None] * dot + (zero - 8.0 * scale)[:, :, :, None] * sum_x[None, :, :, :]
        total = tl.reshape(total, [N, P, GROUPS * PARTS])
    else:
        total = tl.zeros([N, P, BLOCK_K // AT_ONCE], tl.float32)
        for first in tl.range(0, length, BLOCK_K, num_stages=STAGES):
            k = first + tl.arange(0, BLOCK_K)
            inside = (k < length)[None, None, :] & live[:, :, None]
            inside_x = (k < length)[None, :] & x_live[:, None]
            x = tl.load(x_ptr + x_first[:, None] + k[None, :], inside_x, 0).to(tl.float32)
            w = tl.load(rows[:, :, None] + k[None, None, :], inside, 0, eviction_policy="evict_first")
            if READ_THROUGH:
                tl.store(pool_rows[:, :, None] + k[None, None, :], w, inside & missing[:, :, None])
            products = tl.reshape(w.to(tl.float32) * x[None, :, :], [N, P, BLOCK_K // AT_ONCE, AT_ONCE])
            total += tl.sum(products, 3)
    return tl.sum(total, 2)


@triton.jit
def _decode_rows(
    x_ptr,
    x_first,  # [P] or [1] int64
    x_live,  # likewise
    slot,  # [P] int64
    source,  # [P] int64, the page to read through, -1: the slot has it
    row,  # [N, P]
    live,  # [N, P]
    weight,  # pointers into the pool's slots: weight,
    scales,
    bias,
    weight_source,  # and into the store's pages
    scales_source,
    bias_source,
    weight_stride,  # elements from a slot to the next, the same in pool and store
    scales_stride,
    bias_stride,
    length,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    FLOAT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    READ_THROUGH: tl.constexpr,
):
    """[N, P] float32: rows of the slots' matrix times vectors, scaled and with their bias."""
    slot = slot[None, :]
    groups = length // (GROUP // 8) if KIND == "int4" else 1
    rows = weight + slot * weight_stride + row.to(tl.int64) * length
    scale_rows = scales + slot * scales_stride + row * groups if KIND == "int4" or KIND == "int8" else rows
    pool_rows = rows
    pool_scale_rows = scale_rows
    missing = live
    if READ_THROUGH:
        page = source[None, :]
        missing = (page >= 0) & live
        rows = tl.where(missing, weight_source + page * weight_stride + row.to(tl.int64) * length, rows)
        if KIND == "int4" or KIND == "int8":
            scale_rows = tl.where(missing, scales_source + page * scales_stride + row * groups, scale_rows)
    # What the end needs is read before the stream of weights, not after.
    if KIND == "int8":
        scale = tl.load(scale_rows, live, 0.0)
        if READ_THROUGH:
            tl.store(pool_scale_rows, scale, missing)
    if bias is not None:
        pool_bias = bias + slot * bias_stride + row
        b = tl.load(pool_bias, live, 0.0)
        if READ_THROUGH:
            from_store = tl.load(bias_source + page * bias_stride + row, missing, 0.0)
            tl.store(pool_bias, from_store, missing)
            b = tl.where(missing, from_store, b)
    y = _matvec(
        x_ptr, x_first, x_live, rows, scale_rows, live, length, KIND, GROUP, FLOAT, BLOCK_K, STAGES,
        pool_rows, pool_scale_rows, missing, READ_THROUGH,
    )  # fmt: skip
    if KIND == "int8":
        y *= scale
    if bias is not None:
        y += b
    return y


@triton.jit
def _decode_gate_up_kernel(
    x_ptr,  # [T, H], as words for int4
    slots_ptr,  # [T, K] int64
    source_ptr,  # [T, K] int64 or None
    pending_ptr,  # [T, K] bool or None
    weight_ptr,
    scales_ptr,
    bias_ptr,
    weight_source_ptr,
    scales_source_ptr,
    bias_source_ptr,
    h_ptr,  # [T * K, I]  output
    weight_stride,
    scales_stride,
    bias_stride,
    chunks,
    I,
    K,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h[pair] = act(gate(x)) * up(x). Grid: (blocks of I, T * K)."""
    length = chunks * CHUNK
    pair = tl.program_id(1).to(tl.int64)
    if pending_ptr is not None:
        if tl.load(pending_ptr + pair) == 0:
            return
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    MATRICES: tl.constexpr = 2 if GATED else 1
    matrix = tl.arange(0, MATRICES)  # gate, up
    none = tl.zeros([MATRICES], tl.int64)
    row = 2 * n[:, None] + matrix[None, :] if INTERLEAVED else n[:, None] + matrix[None, :] * I
    live = (n < I)[:, None] & (matrix >= 0)[None, :]
    READ_THROUGH: tl.constexpr = source_ptr is not None
    sums = _decode_rows(
        x_ptr, tl.zeros([1], tl.int64) + (pair // K) * length, tl.arange(0, 1) >= 0, none + tl.load(slots_ptr + pair),
        none + tl.load(source_ptr + pair) if READ_THROUGH else none, row, live,
        weight_ptr, scales_ptr, bias_ptr, weight_source_ptr, scales_source_ptr, bias_source_ptr,
        weight_stride, scales_stride, bias_stride, length,
        KIND, GROUP, h_ptr.dtype.element_ty, BLOCK_K, STAGES, READ_THROUGH,
    )  # fmt: skip
    gate = tl.sum(tl.where(matrix[None, :] == 0, sums, 0.0), 1)
    up = tl.sum(tl.where(matrix[None, :] == MATRICES - 1, sums, 0.0), 1)
    h = activate_tile(gate, up, ACTIVATION, GATED)
    tl.store(h_ptr + pair * I + n, h.to(h_ptr.dtype.element_ty), n < I)


@triton.jit
def _decode_down_kernel(
    h_ptr,  # [T * K, I], as words for int4
    slots_ptr,  # [T, K] int64
    source_ptr,  # [T, K] int64 or None
    pending_ptr,  # [T, K] bool or None
    gates_ptr,  # [T, K] float32
    weight_ptr,
    scales_ptr,
    bias_ptr,
    weight_source_ptr,
    scales_source_ptr,
    bias_source_ptr,
    partial_ptr,  # [T, K, H] float32 or None: results of pairs, written if not FINISH, else read where not pending
    y_ptr,  # [T, H]  output
    weight_stride,
    scales_stride,
    bias_stride,
    chunks,
    H,
    K,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    PADDED_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    FINISH: tl.constexpr,
):
    """y[t] = sum over k of gates[t, k] * down(h[t, k]), all K rows of an output at once. Grid: (blocks of H, T)."""
    length = chunks * CHUNK
    k = tl.arange(0, PADDED_K)
    pair = tl.program_id(1).to(tl.int64) * K + k
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    READ_THROUGH: tl.constexpr = source_ptr is not None
    slot = tl.load(slots_ptr + pair, k < K, 0).to(tl.int64)
    source = tl.load(source_ptr + pair, k < K, -1).to(tl.int64) if READ_THROUGH else slot
    inside = (n < H)[:, None] & (k < K)[None, :]
    computed = k < K
    if pending_ptr is not None:
        computed = tl.load(pending_ptr + pair, k < K, 0) != 0
    live = inside & computed[None, :]
    row = n[:, None] + tl.zeros([1, PADDED_K], tl.int32)
    if FINISH:
        gates = tl.load(gates_ptr + pair, k < K, 0.0)
    if partial_ptr is not None:
        at = partial_ptr + pair[None, :] * H + n[:, None]
        if FINISH:
            earlier = tl.load(at, inside & (live == 0), 0.0)
    sums = _decode_rows(
        h_ptr, pair * length, computed, slot, source, row, live,
        weight_ptr, scales_ptr, bias_ptr, weight_source_ptr, scales_source_ptr, bias_source_ptr,
        weight_stride, scales_stride, bias_stride, length,
        KIND, GROUP, y_ptr.dtype.element_ty, BLOCK_K, STAGES, READ_THROUGH,
    )  # fmt: skip
    if not FINISH:
        tl.store(at, sums, live)
    else:
        if partial_ptr is not None:
            sums = tl.where(live, sums, earlier)
        y = tl.sum(sums * gates[None, :], 1)
        tl.store(y_ptr + tl.program_id(1).to(tl.int64) * H + n, y.to(y_ptr.dtype.element_ty), n < H)


def as_words(floats: torch.Tensor) -> torch.Tensor:
    """Pairs of numbers along the last dimension as integers of twice their size, for ``two_floats``."""
    if floats.storage_offset() % 2:  # between two words
        floats = floats.clone()
    return floats.view(torch.int64 if floats.dtype == torch.float32 else torch.int32)


def plan_decode(
    x: torch.Tensor,
    slots: torch.Tensor,
    gates: torch.Tensor,
    weights: dict[str, torch.Tensor],
    page_format: PageFormat,
    out: torch.Tensor,
    h: torch.Tensor,
    pending: torch.Tensor | None = None,
    partial: torch.Tensor | None = None,
    finish: bool = True,
    source: torch.Tensor | None = None,
    source_weights: dict[str, torch.Tensor] | None = None,
) -> list[Launch]:
    """The two launches. Arguments as ``cachemoe.kernels.experts.experts``.

    ``h`` is scratch ``[T * K, I]`` in x's dtype; ``source`` and ``source_weights`` are the pages and the store's views
    of ``experts_read_through``.
    """
    tokens, top_k = slots.shape
    int4 = page_format.kind == "int4"
    # Left to itself the assembler would spill to fit more programs.
    limit = 160 if int4 and pending is not None else None
    launches = []
    for name, kernel, vectors, outputs in (
        ("gate_up", _decode_gate_up_kernel, x, page_format.intermediate),
        ("down", _decode_down_kernel, h, page_format.hidden),
    ):
        weight, scales, bias = (weights.get(name + part) for part in ("", "_scales", "_bias"))
        from_store = [None if source is None else source_weights.get(name + part) for part in ("", "_scales", "_bias")]
        if int4:
            weight, scales = weight.view(torch.int32), as_words(scales)
            if source is not None:
                from_store[:2] = from_store[0].view(torch.int32), as_words(from_store[1])
        matrices = triton.next_power_of_2(top_k) if name == "down" else 2 if page_format.gated else 1
        # A row of int4 groups is a multiple of 16 bytes: given as their number, the compiler knows.
        chunk = page_format.group // 8 if int4 else 1
        tiles = decode_tiles(weight.dtype, outputs, weight.shape[-1], matrices, page_format.group)
        arguments = {
            "x_ptr" if name == "gate_up" else "h_ptr": as_words(vectors) if int4 else vectors,
            "slots_ptr": slots,
            "source_ptr": source,
            "pending_ptr": pending,
            "weight_ptr": weight,
            "scales_ptr": scales,
            "bias_ptr": bias,
            "weight_source_ptr": from_store[0],
            "scales_source_ptr": from_store[1],
            "bias_source_ptr": from_store[2],
            "weight_stride": weight.stride(0),
            "scales_stride": 0 if scales is None else scales.stride(0),
            "bias_stride": 0 if bias is None else bias.stride(0),
            "chunks": weight.shape[-1] // chunk,
            "K": top_k,
        }
        constants = {
            "KIND": page_format.kind,
            "GROUP": page_format.group,
            "CHUNK": chunk,
            "BLOCK_N": tiles.block_n,
            "BLOCK_K": tiles.block_k,
            "STAGES": tiles.stages,
        }
        if name == "gate_up":
            arguments |= {"h_ptr": h, "I": page_format.intermediate}
            constants |= {
                "GATED": page_format.gated,
                "ACTIVATION": page_format.activation,
                "INTERLEAVED": page_format.interleaved,
            }
            second = tokens * top_k
        else:
            arguments |= {"gates_ptr": gates, "partial_ptr": partial, "y_ptr": out, "H": page_format.hidden}
            constants |= {"PADDED_K": matrices, "FINISH": finish}
            second = tokens
        grid = (triton.cdiv(outputs, tiles.block_n), second)
        launches.append(
            Launch(
                kernel,
                grid,
                arguments,
                constants,
                tiles.warps,
                streams_pages=True,
                pipelined=tiles.stages > 1,
                max_registers=limit,
            )
        )
    return launches
