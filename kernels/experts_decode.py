"""Experts for few pairs of token and expert: output-stationary matrix-vector products over slots, in two launches.

A program computes ``BLOCK_N`` outputs: it streams their rows through registers, reduces once and stores once. Nothing
is sorted, copied or added atomically. ``gate_up`` writes act(gate(x)) * up(x) for each pair; ``down`` holds the rows of
all K experts of a token side by side and sums them weighted by the gates.

With a ``source``, missing experts are read through: from their page in the store, which the device can read, and
written into their slot in the same pass.
"""

import math

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
def _add_two(products, sums, words, pair, PLACE: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr):
    """``products`` and two values of each word times ``pair``'s two numbers, ``sums`` and the two numbers.

    The values are those from bit ``PLACE`` on. Products and sums are [N, P, K]: each thread sums the numbers that it
    has read, once for all its rows, and asks no other.
    Values stay where they are in the word: q from bit b on, read as the bits of a float32, is q * 2**(b - 149), while
    it ends below bit 24. Numbers are scaled by 2**(80 - b), and every product is q * x / 2**69 without a conversion;
    nothing is lost for x of 2**-57 to 2**47.
    """
    even, odd = two_floats(pair, FLOAT)
    sums += (even + odd)[None, :, :]
    if PLACE >= 24:
        words >>= 8
    LOW: tl.constexpr = PLACE - 8 if PLACE >= 24 else PLACE
    HIGH: tl.constexpr = LOW + BITS
    ONES: tl.constexpr = (1 << BITS) - 1
    low = (words & (ONES << LOW)).to(tl.float32, bitcast=True)
    high = (words & (ONES << HIGH)).to(tl.float32, bitcast=True)
    products += low * (even * 2.0 ** (80 - LOW))[None, :, :]
    products += high * (odd * 2.0 ** (80 - HIGH))[None, :, :]
    return products, sums


@triton.jit
def _read(
    rows,  # [N * P] pointers
    k,  # [K] elements of a row
    inside,  # [K] bool
    live,  # [N * P] bool
    pool_rows,  # with READ_THROUGH: where what was read belongs,
    missing,  # and [N * P] bool, rows that are to be written there
    N: tl.constexpr,
    READ_THROUGH: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """[N, P, K]: elements of the rows that are live, 0 for the others."""
    read = tl.load(rows[:, None] + k[None, :], inside[None, :] & live[:, None], 0, eviction_policy=EVICTION)
    if READ_THROUGH:
        tl.store(pool_rows[:, None] + k[None, :], read, inside[None, :] & missing[:, None])
    return tl.reshape(read, [N, rows.shape[0] // N, k.shape[0]])


@triton.jit
def _bytes(words):
    """[N, P, 4 * K] float32: (q + 128) * 2**-149 for each byte q, -128..127, of [N, P, K] words, lowest byte first.

    It is the float32 whose bits are q + 128: to convert a byte would take as long as four other instructions.
    """
    words ^= -2139062144  # 0x80808080: adds 128 to each byte
    even, odd = tl.join(words & 255, (words >> 16) & 255), tl.join((words >> 8) & 255, (words >> 24) & 255)
    bits = tl.reshape(tl.join(even, odd), [words.shape[0], words.shape[1], 4 * words.shape[2]])
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _matvec(
    x_ptr,  # the vectors; as words of two elements for int4 and int2
    x_first,  # [P] where vector p begins, or [1], the same for all, counted as length is
    x_live,  # [P] or [1] bool, vectors to read; the others are 0
    rows,  # [N * P] pointers to the first element of each row
    scale_rows,  # [N * P] pointers to each row's scales, as words of a scale and a zero (int4, int2)
    live,  # [N * P] bool, rows to read; the others give 0
    length,  # elements of a row: values, or words of 32 / BITS (int8, int4, int2)
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    FLOAT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    pool_rows,  # with READ_THROUGH: [N * P] pointers to where the rows belong in the pool,
    pool_scale_rows,
    missing,  # and [N * P] bool, rows that are to be written there
    N: tl.constexpr,
    READ_THROUGH: tl.constexpr,
):
    """[N * P] float32: row (n, p) times vector p, before int8's scales.

    A thread has several rows of one vector, and reads and scales the vector once for them. Rows are one dimension while
    they are read, p counting faster: had they two, Triton 3.6 would give a thread one row each of several vectors.
    """
    P: tl.constexpr = rows.shape[0] // N
    # A thread sums what it loads at once, 16 bytes, so that few accumulators are live.
    AT_ONCE: tl.constexpr = 128 // rows.dtype.element_ty.primitive_bitwidth
    PARTS: tl.constexpr = BLOCK_K // AT_ONCE
    if GROUP:
        VALUES: tl.constexpr = 32 // BITS
        GROUP_WORDS: tl.constexpr = GROUP // VALUES
        GROUPS: tl.constexpr = BLOCK_K // GROUP_WORDS
        EACH: tl.constexpr = max(1, PARTS // GROUPS)
        total = tl.zeros([N, P, GROUPS, EACH], tl.float32)
        for first in tl.range(0, length, BLOCK_K, num_stages=STAGES):
            k = first + tl.arange(0, BLOCK_K)
            inside = k < length
            several = _read(rows, k, inside, live, pool_rows, missing, N, READ_THROUGH, "evict_first")
            g = first // GROUP_WORDS + tl.arange(0, GROUPS)
            some = g < length // GROUP_WORDS
            pairs = _read(scale_rows, g, some, live, pool_scale_rows, missing, N, READ_THROUGH, "")
            inside = inside[None, :] & x_live[:, None]
            at = x_ptr + VALUES // 2 * (x_first[:, None] + k[None, :])
            products, sums = tl.zeros([N, P, BLOCK_K], tl.float32), tl.zeros([N, P, BLOCK_K], tl.float32)
            for i in tl.static_range(VALUES // 2):
                pair = tl.load(at + i, inside, 0)
                products, sums = _add_two(products, sums, several, pair, 2 * BITS * i, BITS, FLOAT)
            dot = tl.sum(tl.reshape(products, [N, P, GROUPS, EACH, GROUP_WORDS // EACH]), 4) * 2.0**69
            sum_x = tl.sum(tl.reshape(sums, [N, P, GROUPS, EACH, GROUP_WORDS // EACH]), 4)
            scale, zero = two_floats(pairs, tl.bfloat16)
            total += scale[:, :, :, None] * dot + (zero - 2.0 ** (BITS - 1) * scale)[:, :, :, None] * sum_x
        total = tl.reshape(total, [N, P, GROUPS * EACH])
    else:
        WORDS: tl.constexpr = BITS == 8 and rows.dtype.element_ty == tl.int32
        EACH: tl.constexpr = 4 if WORDS else 1
        total = tl.zeros([N, P, PARTS], tl.float32)
        for first in tl.range(0, length, BLOCK_K, num_stages=STAGES):
            k = first + tl.arange(0, BLOCK_K)
            w = _read(rows, k, k < length, live, pool_rows, missing, N, READ_THROUGH, "evict_first")
            k = EACH * first + tl.arange(0, EACH * BLOCK_K)
            inside = (k < EACH * length)[None, :] & x_live[:, None]
            x = tl.load(x_ptr + EACH * x_first[:, None] + k[None, :], inside, 0).to(tl.float32)
            if WORDS:
                # (q + 128) * x - 128 * x, all times 2**-69, for x of 2**-57 to 2**47. What cancels costs up to 2**-15
                # of the row's scale times the sum of abs(x); the rounding of the weights, up to half of that product.
                x *= 2.0**80
                w = _bytes(w)
                excess = tl.broadcast_to((x * -(2.0**-142))[None, :, :], w.shape)
                total += tl.sum(tl.reshape(excess, [N, P, PARTS, EACH * AT_ONCE]), 3)
            products = w.to(tl.float32) * x[None, :, :]
            total += tl.sum(tl.reshape(products, [N, P, PARTS, EACH * AT_ONCE]), 3)
        if WORDS:
            total *= 2.0**69
    return tl.reshape(tl.sum(total, 2), [N * P])


@triton.jit
def _decode_rows(
    x_ptr,
    x_first,  # [P] or [1] int64
    x_live,  # likewise
    slot,  # [N * P] int64
    source,  # [N * P] int64, the page to read through, -1: the slot has it
    row,  # [N * P]
    live,  # [N * P]
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
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    FLOAT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    N: tl.constexpr,
    READ_THROUGH: tl.constexpr,
):
    """[N * P] float32: rows of the slots' matrix times vectors, scaled and with their bias."""
    groups = length // (GROUP * BITS // 32) if GROUP else 1
    rows = weight + slot * weight_stride + row.to(tl.int64) * length
    scale_rows = scales + slot * scales_stride + row * groups if BITS <= 8 else rows
    pool_rows = rows
    pool_scale_rows = scale_rows
    missing = live
    if READ_THROUGH:
        missing = (source >= 0) & live
        rows = tl.where(missing, weight_source + source * weight_stride + row.to(tl.int64) * length, rows)
        if BITS <= 8:
            scale_rows = tl.where(missing, scales_source + source * scales_stride + row * groups, scale_rows)
    # What the end needs is read before the stream of weights, not after.
    if BITS == 8:
        scale = tl.load(scale_rows, live, 0.0)
        if READ_THROUGH:
            tl.store(pool_scale_rows, scale, missing)
    if bias is not None:
        pool_bias = bias + slot * bias_stride + row
        b = tl.load(pool_bias, live, 0.0)
        if READ_THROUGH:
            from_store = tl.load(bias_source + source * bias_stride + row, missing, 0.0)
            tl.store(pool_bias, from_store, missing)
            b = tl.where(missing, from_store, b)
    y = _matvec(
        x_ptr, x_first, x_live, rows, scale_rows, live, length, BITS, GROUP, FLOAT, BLOCK_K, STAGES,
        pool_rows, pool_scale_rows, missing, N, READ_THROUGH,
    )  # fmt: skip
    if BITS == 8:
        y *= scale
    if bias is not None:
        y += b
    return y


@triton.jit
def _decode_gate_up_kernel(
    x_ptr,  # [T, H], as words for int4 and int2
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
    BITS: tl.constexpr,
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
    slot = tl.load(slots_ptr + pair)
    if slot < 0:  # a dropped expert
        return
    if pending_ptr is not None:
        if tl.load(pending_ptr + pair) == 0:
            return
    MATRICES: tl.constexpr = 2 if GATED else 1
    first = tl.program_id(0) * BLOCK_N
    m = tl.arange(0, BLOCK_N * MATRICES)
    n = tl.minimum(first + m // MATRICES, I - 1)  # the last row for those beyond
    matrix = m % MATRICES  # gate, up
    none = tl.zeros([BLOCK_N * MATRICES], tl.int64)
    row = 2 * n + matrix if INTERLEAVED else n + matrix * I
    READ_THROUGH: tl.constexpr = source_ptr is not None
    sums = _decode_rows(
        x_ptr, tl.zeros([1], tl.int64) + (pair // K) * length, tl.arange(0, 1) >= 0, none + slot,
        none + tl.load(source_ptr + pair) if READ_THROUGH else none, row, m >= 0,
        weight_ptr, scales_ptr, bias_ptr, weight_source_ptr, scales_source_ptr, bias_source_ptr,
        weight_stride, scales_stride, bias_stride, length,
        BITS, GROUP, h_ptr.dtype.element_ty, BLOCK_K, STAGES, BLOCK_N, READ_THROUGH,
    )  # fmt: skip
    sums = tl.reshape(sums, [BLOCK_N, MATRICES])
    matrix = tl.arange(0, MATRICES)
    gate = tl.sum(tl.where(matrix[None, :] == 0, sums, 0.0), 1)
    up = tl.sum(tl.where(matrix[None, :] == MATRICES - 1, sums, 0.0), 1)
    n = first + tl.arange(0, BLOCK_N)
    h = activate_tile(gate, up, ACTIVATION, GATED)
    tl.store(h_ptr + pair * I + n, h.to(h_ptr.dtype.element_ty), n < I)


@triton.jit
def _decode_down_kernel(
    h_ptr,  # [T * K, I], as words for int4 and int2
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
    BITS: tl.constexpr,
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
    first = tl.program_id(0) * BLOCK_N
    token = tl.program_id(1).to(tl.int64)
    m = tl.arange(0, BLOCK_N * PADDED_K)
    n, k = tl.minimum(first + m // PADDED_K, H - 1), m % PADDED_K  # the last row for those beyond
    pair = token * K + k
    READ_THROUGH: tl.constexpr = source_ptr is not None
    slot = tl.load(slots_ptr + pair, k < K, -1).to(tl.int64)
    source = tl.load(source_ptr + pair, k < K, -1).to(tl.int64) if READ_THROUGH else slot
    taking_part = slot >= 0  # the others are dropped, or beyond K
    live = taking_part
    if pending_ptr is not None:
        live &= tl.load(pending_ptr + pair, k < K, 0) != 0
    if FINISH:
        gates = tl.load(gates_ptr + pair, taking_part, 0.0)
    if partial_ptr is not None:
        at = partial_ptr + pair * H + n
        if FINISH:
            earlier = tl.load(at, taking_part & (live == 0), 0.0)
    k = tl.arange(0, PADDED_K)
    vectors = token * K + k
    computed = tl.load(slots_ptr + vectors, k < K, -1) >= 0
    if pending_ptr is not None:
        computed &= tl.load(pending_ptr + vectors, k < K, 0) != 0
    sums = _decode_rows(
        h_ptr, vectors * length, computed, slot, source, n, live,
        weight_ptr, scales_ptr, bias_ptr, weight_source_ptr, scales_source_ptr, bias_source_ptr,
        weight_stride, scales_stride, bias_stride, length,
        BITS, GROUP, y_ptr.dtype.element_ty, BLOCK_K, STAGES, BLOCK_N, READ_THROUGH,
    )  # fmt: skip
    if not FINISH:
        tl.store(at, sums, live)
    else:
        if partial_ptr is not None:
            sums = tl.where(live, sums, earlier)
        y = tl.sum(tl.reshape(sums * gates, [BLOCK_N, PADDED_K]), 1)
        n = first + tl.arange(0, BLOCK_N)
        tl.store(y_ptr + token * H + n, y.to(y_ptr.dtype.element_ty), n < H)


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
    grouped = page_format.group > 0
    # Left to itself the assembler would spill to fit more programs: a word of int2 takes 16 numbers of x.
    limit = 168 if page_format.bits == 2 else None
    launches = []
    for name, kernel, vectors, outputs in (
        ("gate_up", _decode_gate_up_kernel, x, page_format.intermediate),
        ("down", _decode_down_kernel, h, page_format.hidden),
    ):
        weight, scales, bias = (weights.get(name + part) for part in ("", "_scales", "_bias"))
        from_store = [None if source is None else source_weights.get(name + part) for part in ("", "_scales", "_bias")]
        # Rows of int8 that are multiples of 16 bytes are read as words; the others a byte at a time, converted.
        in_words = grouped or (page_format.kind == "int8" and weight.shape[-1] % 16 == 0)
        if in_words:
            weight = weight.view(torch.int32)
            from_store[0] = None if source is None else from_store[0].view(torch.int32)
        if grouped:
            scales = as_words(scales)
            from_store[1] = None if source is None else as_words(from_store[1])
        matrices = triton.next_power_of_2(top_k) if name == "down" else 2 if page_format.gated else 1
        # A row's words are given as the number of groups or of 16 bytes: so the compiler knows how they are aligned.
        group = page_format.group * page_format.bits // 32  # in words
        chunk = math.gcd(weight.shape[-1], max(4, group)) if in_words else 1
        tiles = decode_tiles(weight.dtype, outputs, weight.shape[-1], matrices)
        arguments = {
            "x_ptr" if name == "gate_up" else "h_ptr": as_words(vectors) if grouped else vectors,
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
            "BITS": page_format.bits,
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
