"""Cache-aware routing in Triton: scores, residency bias, top-k, gate weights and the residency update in one launch.

    logits [B, T, E], or hidden states [B, T, H] and the router's weight -> ids, weights, slots, hits, misses

Grid: one program a cache, which steps through the T tokens with the page table in registers. With the gate fused:
(B, E), one program an expert's logits, and a cache's last to finish routes. Selection is an iterated maximum of int32
keys that sort as the float32 values do, one warp-wide instruction each; ties go to the lower id. The specification is
:func:`cachemoe.kernels.reference_route.route`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate

import torch
import triton
import triton.language as tl

from cachemoe.kernels.launch import Launch
from cachemoe.kernels.policy import EVICT_WORDS, KNOBS, Policy, noise_bits, words_of
from cachemoe.kernels.state import STATE, GateScores, Routing

MAX_EXPERTS, MAX_TOP_K, MAX_GROUPS = 512, 16, 32

OUTPUTS = ("ids", "weights", "slots", "hits", "miss_pages", "miss_slots", "miss_count")

LOWEST = tl.constexpr(-(2**31))  # below every key: not to be chosen
HIGHEST = tl.constexpr(2**31 - 1)  # NaN's key

# Every word, in an order in which both a key and a grade name theirs: a bit each.
ALL_WORDS = (
    *("value", "rank", "weight", "first", "before", "place", "have", "span", "cost", "noise", "table", "a", "b"),
)
WORD_COUNT, EVICT_COUNT = tl.constexpr(len(ALL_WORDS)), tl.constexpr(len(EVICT_WORDS))


def _bits(words: Sequence[str], known: Sequence[str] = ALL_WORDS) -> int:
    return sum(1 << known.index(word) for word in words)


VALUE, RANK, WEIGHT, FIRST, BEFORE, PLACE, HAVE, SPAN, COST, NOISE, TABLE, A, B = (
    tl.constexpr(_bits([word])) for word in ALL_WORDS
)


@triton.jit
def _key(value):
    """int32 that sorts as float32 does, NaN highest, -0.0 equal to 0.0."""
    bits = tl.where(value == 0.0, 0, value.to(tl.int32, bitcast=True))
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(value != value, HIGHEST, key)


@triton.jit
def _value(key):
    """The float32 that a key was made of."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _highest(key, i, SIZE: tl.constexpr):
    """Position of the highest key, the lowest among equals."""
    return tl.min(tl.where(key == tl.max(key, 0), i, SIZE), 0)


@triton.jit
def _score(logits, top, total, FUNCTION: tl.constexpr):
    """Gate scores; ``top`` and ``total`` are the row's highest logit and its sum of exp(logit - top)."""
    if FUNCTION == "softmax":
        score = tl.exp(logits - top) / total
    elif FUNCTION == "sigmoid":
        score = 1.0 / (1.0 + tl.exp(-logits))
    else:
        score = tl.where(logits < 0.0, 0.0, logits)
    return score


@triton.jit
def _chosen_groups(
    row_ptr, correction_ptr, top, total,
    FUNCTION: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, BEST_TWO: tl.constexpr,
    GROUP: tl.constexpr, GROUPS_PAD: tl.constexpr, GROUP_PAD: tl.constexpr,
):  # fmt: skip
    """int32 with a bit set for each group that the token may choose from."""
    g, i = tl.arange(0, GROUPS_PAD), tl.arange(0, GROUP_PAD)
    e = g[:, None] * GROUP + i[None, :]
    inside = (g < GROUPS)[:, None] & (i < GROUP)[None, :]
    value = tl.load(row_ptr + e, inside, 0.0).to(tl.float32)
    if BEST_TWO or correction_ptr is not None:
        value = _score(value, top, total, FUNCTION)
    if correction_ptr is not None:
        value += tl.load(correction_ptr + e, inside, 0.0)
    key = tl.where(inside, _key(value), LOWEST)
    best = tl.max(key, 1)
    if BEST_TWO:
        first = tl.min(tl.where(key == best[:, None], i[None, :], GROUP_PAD), 1)
        second = tl.max(tl.where(i[None, :] == first[:, None], LOWEST, key), 1)
        best = tl.where(g < GROUPS, _key(_value(best) + _value(second)), LOWEST)
    chosen = 0
    for _ in range(TOP_GROUPS):
        group = _highest(best, g, GROUPS_PAD)
        chosen |= 1 << group
        best = tl.where(g == group, LOWEST, best)
    return chosen


@triton.jit
def _ranks(
    row_ptr, correction_ptr, key, e, top, total, whole, groups,
    E: tl.constexpr, E_PAD: tl.constexpr, GROUP: tl.constexpr, FUNCTION: tl.constexpr, GROUPED: tl.constexpr,
    MASS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of each expert how many candidates are ranked better, and the share of the scores that those have."""
    rank, before = tl.zeros([E_PAD], tl.int32), tl.zeros([E_PAD], tl.float32)
    for first in range(0, E, CHUNK):
        o = first + tl.arange(0, CHUNK)
        logits = tl.load(row_ptr + o, o < E, 0.0).to(tl.float32)
        value = logits
        if MASS or correction_ptr is not None:
            score = _score(logits, top, total, FUNCTION)
        if correction_ptr is not None:
            value = score + tl.load(correction_ptr + o, o < E, 0.0)
        other, candidate = _key(value), o < E
        if GROUPED:
            candidate &= ((groups >> (o // GROUP)) & 1) == 1
        better = (other[:, None] > key[None, :]) | ((other[:, None] == key[None, :]) & (o[:, None] < e[None, :]))
        better &= candidate[:, None]
        rank += tl.sum(better.to(tl.int32), 0)
        if MASS:
            before += tl.sum(tl.where(better, (score / whole)[:, None], 0.0), 0)
    return rank, before


@triton.jit
def _named(WORDS: tl.constexpr, COUNT: tl.constexpr, values):
    """Those of the values that a function names, in order."""
    named = ()
    for i in tl.static_range(COUNT):
        if (WORDS >> i) & 1:
            named = named + (values[i],)  # noqa: RUF005 (the compiler knows no other way)
    return named


@triton.jit
def _shares(score, place, K: tl.constexpr):
    """Of the experts in places below K their shares of the scores, those of the best, and of the better-placed."""
    total, first = 0.0, 0.0
    for k in range(K):  # place by place: the sum rounds as elsewhere
        total += tl.sum(tl.where(place == k, score, 0.0), 0)
    share = score / tl.maximum(total, 1.1754943508222875e-38)
    before, running = tl.zeros_like(score), 0.0
    for k in range(K):
        before = tl.where(place == k, running, before)
        running += tl.sum(tl.where(place == k, share, 0.0), 0)
        if k == 0:
            first = running
    return share, first, before


@triton.jit
def _bounded(chosen, key, score, regret, e, K: tl.constexpr, SIZE: tl.constexpr):
    """The chosen experts, with those swaps undone that give up ``regret`` or more."""
    left = key != key
    for _ in range(K):
        left |= e == _highest(tl.where(left, LOWEST, key), e, SIZE)  # the model's own
    own = left
    left &= chosen == 0
    brought_in = chosen & (own == 0)
    for _ in range(K):
        new = _highest(tl.where(brought_in, key, LOWEST), e, SIZE)
        worst = tl.min(tl.where(left, key, HIGHEST), 0)
        old = tl.max(tl.where(left & (key == worst), e, -1), 0)  # among equals the higher id is the worse
        given_up = tl.sum(tl.where(e == old, score, 0.0), 0) - tl.sum(tl.where(e == new, score, 0.0), 0)
        undone = (old >= 0) & (((given_up < regret) & (regret > 0)) == 0)
        chosen = tl.where(undone & (e == new), False, chosen | (undone & (e == old)))
        left &= e != old
        brought_in &= e != new
    return chosen


@triton.jit
def _gate(
    cache, hidden_ptr, router_ptr, router_stride, logits_ptr, ticket_ptr, T, H, E: tl.constexpr, BLOCK_H: tl.constexpr
):
    """The logits of one expert for all tokens of the cache; whether the cache's other experts are done."""
    e = tl.program_id(1)
    row_ptr = router_ptr + cache * router_stride + e.to(tl.int64) * H
    for t in range(T):
        x_ptr = hidden_ptr + (cache * T + t) * H
        total = tl.zeros([BLOCK_H], tl.float32)
        for first in tl.range(0, H, BLOCK_H, num_stages=4):
            h = first + tl.arange(0, BLOCK_H)
            weight = tl.load(row_ptr + h, h < H, 0.0)
            x = tl.load(x_ptr + h, h < H, 0.0)
            total += weight.to(tl.float32) * x.to(tl.float32)
        tl.store(logits_ptr + (cache * T + t) * E + e, tl.sum(total, 0))
    tl.debug_barrier()  # the logits are written before the ticket says so, whichever threads do either
    return tl.atomic_add(ticket_ptr + cache, 1, sem="acq_rel") == tl.num_programs(1) - 1


@triton.jit
def _route_kernel(
    # inputs: logits [B, T, E]; fused, they are an output, of hidden [B, T, H] and router [E, H] or [B, E, H]
    logits_ptr, stride_b, stride_t, correction_ptr, correction_stride,
    hidden_ptr, router_ptr, router_stride, ticket_ptr,
    # state: [B, V * E], [B, C], [B, E] and [B]
    slot_of_ptr, page_of_ptr, capacity_ptr, last_use_ptr, uses_ptr, clock_ptr, tokens_ptr, range_sum_ptr, heavy_ptr,
    # [B, KNOBS], [B, E] and numbers
    knobs_ptr, table_ptr, epsilon, scale,
    # outputs: [B, T, K], [B, T * K], [B]
    ids_ptr, weights_ptr, slots_ptr, hits_ptr, miss_pages_ptr, miss_slots_ptr, miss_count_ptr, asked_ptr,
    # shapes and constants
    T, H,
    E: tl.constexpr, C: tl.constexpr, K: tl.constexpr, E_PAD: tl.constexpr, C_PAD: tl.constexpr,
    EVICT: tl.constexpr, EVICT_NAMED: tl.constexpr, LEVELS: tl.constexpr, ENDS: tl.constexpr, CHEAPER_PAD: tl.constexpr,
    NOISE_BITS: tl.constexpr, FUNCTION: tl.constexpr, RENORMALISE: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, BEST_TWO: tl.constexpr,
    GROUPS_PAD: tl.constexpr, GROUP_PAD: tl.constexpr,
    KEY: tl.constexpr, GRADE: tl.constexpr, WORDS: tl.constexpr, GRADE_WORDS: tl.constexpr, BOUNDED: tl.constexpr,
    SWAPS: tl.constexpr, OF_RUNNING: tl.constexpr,
    KNOBS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    cache = tl.program_id(0).to(tl.int64)
    if router_ptr is not None:
        last = _gate(cache, hidden_ptr, router_ptr, router_stride, logits_ptr, ticket_ptr, T, H, E, BLOCK_H)
        if not last:
            return
        tl.store(ticket_ptr + cache, 0)
    logits_ptr += cache * stride_b
    if correction_ptr is not None:
        correction_ptr += cache * correction_stride
    GROUP: tl.constexpr = E // GROUPS
    GROUPED: tl.constexpr = TOP_GROUPS < GROUPS
    KEYED: tl.constexpr = KEY is not None
    # Said not to be contiguous: each load would choose a layout of its own, and every step would change between them.
    e, c = tl.max_contiguous(tl.arange(0, E_PAD), 1), tl.max_contiguous(tl.arange(0, C_PAD), 1)
    real = e < E
    logits = tl.load(logits_ptr + e, real & (T > 0), 0.0)
    slot_of = tl.load(slot_of_ptr + cache * LEVELS * E + e, real, -1).to(tl.int32)
    if LEVELS > 1:  # the cheaper levels' slots, a row each; those of full precision come after them
        v = 1 + tl.arange(0, CHEAPER_PAD)[:, None]
        cheap = tl.load(slot_of_ptr + cache * LEVELS * E + v * E + e[None, :], (v < LEVELS) & real[None, :], -1)
        cheap = cheap.to(tl.int32)
        heavy_touches = tl.zeros([E_PAD], tl.int32)
    page_of = tl.load(page_of_ptr + cache * C + c, c < C, 0).to(tl.int32)
    capacity = ENDS[LEVELS - 1] + tl.load(capacity_ptr + cache)
    clock = tl.load(clock_ptr + cache)
    seen = tl.load(tokens_ptr + cache)
    range_sum = tl.load(range_sum_ptr + cache)
    GRADED: tl.constexpr = GRADE is not None
    EITHER: tl.constexpr = WORDS | GRADE_WORDS
    a, b, miss, regret = 0.0, 0.0, 0.0, 0.0
    if KEYED or GRADED:
        knobs_ptr += cache * KNOBS
        j = tl.load(knobs_ptr).to(tl.int32)
        if A & EITHER:
            a = tl.load(knobs_ptr + 1)
        if B & EITHER:
            b = tl.load(knobs_ptr + 2)
        if COST & EITHER:
            miss = tl.load(knobs_ptr + 3)
        if BOUNDED:
            regret = tl.load(knobs_ptr + 4)
        if NOISE & EITHER:
            seed = tl.load(knobs_ptr + 5).to(tl.int64) << 24
    if correction_ptr is not None:
        correction = tl.load(correction_ptr + e, real, 0.0)

    if TABLE & EITHER or SWAPS:
        table = tl.load(table_ptr + cache * E + e, real, 0.0)
    free = tl.sum(((page_of < 0) & (c < capacity)).to(tl.int32), 0)
    # Of each expert the touches of this call, and the clock after the last of them, 0 before it, from the call's start:
    # int32 in registers, where last_use and uses are only read for a miss.
    touches, touched = tl.zeros([E_PAD], tl.int32), tl.zeros([E_PAD], tl.int32)
    missed, elapsed = 0, 0
    for t in range(T):
        x = logits.to(tl.float32)
        logits = tl.load(logits_ptr + stride_t + e, real & (t + 1 < T), 0.0)  # the next token's, ahead of time
        top, total = 0.0, 1.0
        if FUNCTION == "softmax":
            top = tl.max(tl.where(real, x, -float("inf")), 0)
            total = tl.sum(tl.where(real, tl.exp(x - top), 0.0), 0)
        score = _score(x, top, total, FUNCTION)
        value = x
        if correction_ptr is not None:
            value = score + correction
        key = tl.where(real, _key(value), LOWEST)
        value_range = _value(tl.max(key, 0)) - _value(tl.min(tl.where(real, key, HIGHEST), 0))
        groups = 0
        if GROUPED:
            groups = _chosen_groups(
                logits_ptr, correction_ptr, top, total,
                FUNCTION, GROUPS, TOP_GROUPS, BEST_TWO, GROUP, GROUPS_PAD, GROUP_PAD,
            )  # fmt: skip
            key = tl.where(((groups >> (e // GROUP)) & 1) == 1, key, LOWEST)

        biased = key
        have, cost, noise, numbers = (slot_of >= 0).to(tl.int32), 0.0, 0.0, 0.0
        if LEVELS > 1:
            cheapest = tl.min(tl.where((cheap >= 0) & (v < LEVELS), v, LEVELS), 0)
            best = tl.where(slot_of >= 0, 0, cheapest)  # the best level resident; that after the last where none is
            have = tl.where(best < LEVELS, best + 1, 0)
        if COST & EITHER:
            cost = tl.where(have > 0, 0.0, miss)
        if TABLE & EITHER:
            numbers = table
        if NOISE & EITHER:
            noise = NOISE_BITS(seed + seen * E + e).to(tl.float32) * 5.9604644775390625e-08
        if KEYED:
            rank, before, span = e, x, 0.0  # where the key names them not
            if (RANK | BEFORE) & WORDS:
                whole = 1.0
                if BEFORE & WORDS:
                    if FUNCTION != "softmax":
                        whole = tl.maximum(tl.sum(tl.where(real, score, 0.0), 0), 1.1754943508222875e-38)
                rank, before = _ranks(
                    logits_ptr, correction_ptr, key, e, top, total, whole, groups,
                    E, E_PAD, GROUP, FUNCTION, GROUPED, BEFORE & WORDS, CHUNK,
                )  # fmt: skip
            if SPAN & WORDS:
                span = (range_sum / tl.maximum(seen, 1).to(tl.float64)).to(tl.float32)
            ranks = rank.to(tl.float32)
            words = (value, ranks, x, x, before, x, have, span, cost, noise, numbers, a, b)
            biased = KEY(*_named(WORDS, WORD_COUNT, words))
            biased = tl.where(key == LOWEST, LOWEST, _key(biased.to(tl.float32)))

        place = tl.full([E_PAD], K, tl.int32)  # of the chosen their place in the token's order, K for the others
        for k in range(K):
            candidates = key
            if KEYED:
                candidates = tl.where(k < j, key, biased)
            chosen = _highest(tl.where(place < K, LOWEST, candidates), e, E_PAD)
            place = tl.where(e == chosen, k, place)
        if KEYED:
            # The best j are in their places; the others are in the order of the bias.
            placed = tl.minimum(j, K)
            left = (place < K) & (place >= j)
            if BOUNDED:
                left = _bounded(place < K, key, score, regret, e, K, E_PAD)
                place = tl.full([E_PAD], K, tl.int32)
                placed = 0
            for k in range(placed, K):
                chosen = _highest(tl.where(left, key, LOWEST), e, E_PAD)
                place = tl.where(e == chosen, k, place)
                left &= e != chosen

        used = place < K
        kept, limit, asked, total = used, tl.zeros([E_PAD], tl.int32), e, 0.0
        offsets = (cache * T + t) * K + place
        if not OF_RUNNING:
            total = tl.sum(tl.where(used, score, 0.0), 0)
        if GRADED:
            weight, first, before = _shares(score, place, K)
            places = place.to(tl.float32)
            words = (value, x, weight, first, before, places, have, x, cost, noise, numbers, a, b)
            level = GRADE(*_named(GRADE_WORDS, WORD_COUNT, words))
            below = (level < 0) & (place > 0)  # NaN is no reason to drop
            kept = used & (below == 0)
            if LEVELS > 1:
                limit = tl.where(level > 0, tl.minimum(level, LEVELS - 1.0), 0.0).to(tl.int32)
                asked = limit * E + e
            if SWAPS:
                swapped = used & below & (level <= -2)
                kept |= swapped
                limit = tl.where(swapped & (have > 0), LEVELS - 1, limit)
        if asked_ptr is not None:
            tl.store(asked_ptr + offsets, tl.where(kept, asked, -1), used)
        if SWAPS:
            for k in range(1, K):
                one = swapped & (place == k) & (have == 0)
                if tl.sum(one.to(tl.int32), 0) > 0:
                    like = tl.sum(tl.where(one, table, 0.0), 0)
                    mates = (used == 0) & (have > 0) & (table == like) & (key != LOWEST)
                    if tl.sum(mates.to(tl.int32), 0) > 0:
                        mate = e == _highest(tl.where(mates, key, LOWEST), e, E_PAD)
                        used |= mate
                        kept = (kept | mate) & (one == 0)
                        limit = tl.where(mate, LEVELS - 1, limit)
                        place = tl.where(mate, k, tl.where(one, K, place))
            offsets = (cache * T + t) * K + place
        taken = place < K
        tl.store(ids_ptr + offsets, e, taken)
        place = tl.where(kept, place, K)  # a dropped expert is as if not chosen
        if LEVELS > 1:
            run = tl.minimum(best, limit)
            missing = kept & (best > limit)
            heavy_touches += (kept & (run == 0)).to(tl.int32)
        else:
            missing = kept & (slot_of < 0)
        touched = tl.where(kept, elapsed + K - place, touched)
        touches += kept.to(tl.int32)
        tl.store(hits_ptr + offsets, kept & (missing == 0), taken)
        weights = tl.where(kept, score, 0.0)
        if RENORMALISE:
            if OF_RUNNING:
                total = tl.sum(weights, 0)
            weights /= total + epsilon
        tl.store(weights_ptr + offsets, weights * scale, taken)

        misses = tl.sum(missing.to(tl.int32), 0)
        # The policy's keys in two halves that int32 compares in order, which takes a warp one instruction each.
        high, low = tl.zeros([E_PAD], tl.int32), tl.zeros([E_PAD], tl.int32)
        if misses > free or (LEVELS > 1 and misses > 0):
            last_use = tl.load(last_use_ptr + cache * E + e, real, 0)
            last_use = tl.where(touched > 0, clock + touched, last_use)
            uses = tl.load(uses_ptr + cache * E + e, real, 0) + touches
            heavy = uses
            if LEVELS > 1:
                heavy = tl.load(heavy_ptr + cache * E + e, real, 0) + heavy_touches
            seen_of = (last_use, uses, heavy, 0, 1, clock + elapsed)
            policy = EVICT(*_named(EVICT_NAMED, EVICT_COUNT, seen_of)).to(tl.int64)
            high, low = (policy >> 32).to(tl.int32), policy.to(tl.int32) ^ LOWEST
        for _ in range(misses):
            if LEVELS > 1:
                expert = tl.min(tl.where(missing, place * E_PAD + e, K * E_PAD), 0) % E_PAD
                missing &= e != expert
                level_now = tl.sum(tl.where(e == expert, run, 0), 0)
                row = tl.where(level_now == 0, slot_of, tl.sum(tl.where(v == level_now, cheap, 0), 0))
                begin, end = ENDS[LEVELS - 1], capacity
                for i in tl.static_range(LEVELS - 1):
                    begin = tl.where(level_now == i + 1, ENDS[i], begin)
                    end = tl.where(level_now == i + 1, ENDS[i + 1], end)
                empty = (page_of < 0) & (c >= begin) & (c < end)
                free = tl.sum(empty.to(tl.int32), 0)
                least = (row >= 0) & ((kept & (run == level_now)) == 0)
            else:
                expert = tl.min(tl.where(kept & (slot_of < 0), place * E_PAD + e, K * E_PAD), 0) % E_PAD
                row, empty = slot_of, (page_of < 0) & (c < capacity)
                least = (slot_of >= 0) & (place == K)
            if free > 0:
                slot = tl.min(tl.where(empty, c, C - 1), 0)
                free -= 1
            else:
                least &= high == tl.min(tl.where(least, high, HIGHEST), 0)
                least &= low == tl.min(tl.where(least, low, HIGHEST), 0)
                slot = tl.min(tl.where(least, row, C - 1), 0)
            page = expert
            if LEVELS > 1:
                page = level_now * E + expert
                slot_of = tl.where((e == expert) & (level_now == 0), slot, tl.where(slot_of == slot, -1, slot_of))
                here = (e == expert)[None, :] & (v == level_now)
                cheap = tl.where(here, slot, tl.where(cheap == slot, -1, cheap))
            else:
                slot_of = tl.where(e == expert, slot, tl.where(slot_of == slot, -1, slot_of))
            page_of = tl.where(c == slot, page, page_of)
            listed = cache * T * K + missed
            tl.store(miss_pages_ptr + listed, page)
            tl.store(miss_slots_ptr + listed, slot)
            missed += 1
        where = slot_of
        if LEVELS > 1:
            where = tl.where(run == 0, slot_of, tl.sum(tl.where(v == run[None, :], cheap, 0), 0))
        tl.store(slots_ptr + offsets, tl.where(kept, where, -1), taken)
        logits_ptr += stride_t
        elapsed += K
        seen += 1
        finite = (value_range == value_range) & (tl.abs(value_range) < float("inf"))
        range_sum += tl.where(finite, value_range, 0.0).to(tl.float64)

    for first in range(missed, T * K, 128):
        i = first + tl.max_contiguous(tl.arange(0, 128), 1)
        tl.store(miss_pages_ptr + cache * T * K + i, -1, i < T * K)
        tl.store(miss_slots_ptr + cache * T * K + i, -1, i < T * K)
    tl.store(miss_count_ptr + cache, missed)
    tl.store(slot_of_ptr + cache * LEVELS * E + e, slot_of, real)
    if LEVELS > 1:
        tl.store(slot_of_ptr + cache * LEVELS * E + v * E + e[None, :], cheap, (v < LEVELS) & real[None, :])
        heavy = tl.load(heavy_ptr + cache * E + e, heavy_touches > 0, 0)
        tl.store(heavy_ptr + cache * E + e, heavy + heavy_touches, heavy_touches > 0)
    tl.store(page_of_ptr + cache * C + c, page_of, c < C)
    tl.store(last_use_ptr + cache * E + e, clock + touched, touched > 0)
    uses = tl.load(uses_ptr + cache * E + e, touched > 0, 0)
    tl.store(uses_ptr + cache * E + e, uses + touches, touched > 0)
    tl.store(clock_ptr + cache, clock + elapsed)
    tl.store(tokens_ptr + cache, seen)
    tl.store(range_sum_ptr + cache, range_sum)


@cache
def _jitted(function: Callable):
    """A policy's function for the kernel: the interpreter calls plain ones, and jitted ones only if they use tl."""
    return function if triton.knobs.runtime.interpret else triton.jit(function)


def warps_of(pages: int) -> int:
    """Warps of a program: one, whose reductions need no barrier, as long as the state fits its registers."""
    return 1 if pages <= 256 else 4


def plan_route(
    logits: torch.Tensor,
    state,
    evict: Callable,
    top_k: int,
    policy: Policy,
    scores: GateScores,
    correction: torch.Tensor | None,
    out: Routing,
    gate: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> Launch:
    """The launch that routes ``logits``; arguments as ``route``'s, the last dimension of ``logits`` of stride 1.

    Args:
        gate: the hidden states ``[B, T, H]``, the router's weight ``[E, H]`` or ``[B, E, H]``, and zeros ``[B]`` int32
            that the launch counts in and leaves at zero; all contiguous. Then ``logits``, contiguous, is an output.

    Raises:
        ValueError: for more experts, experts a token or groups than the kernel takes, or caches that layers share: no
            program could hold their pages.
    """
    caches, tokens, experts = logits.shape
    if state.layers > 1:
        raise ValueError("the kernel routes layers that have caches of their own, not one that they share")
    if experts > MAX_EXPERTS or top_k > MAX_TOP_K or scores.groups > MAX_GROUPS:
        raise ValueError(
            f"the kernel takes up to {MAX_EXPERTS} experts, {MAX_TOP_K} a token and {MAX_GROUPS} groups, "
            f"not {experts}, {top_k} and {scores.groups}"
        )
    slots, num_warps, padded = state.page_of.shape[1], warps_of(experts * state.levels), triton.next_power_of_2(experts)
    hidden, router, ticket = gate or (None, None, None)
    arguments = {
        "logits_ptr": logits,
        "stride_b": logits.stride(0),
        "stride_t": logits.stride(1),
        "correction_ptr": correction,
        "correction_stride": experts if correction is not None and correction.dim() == 2 else 0,
        "hidden_ptr": hidden,
        "router_ptr": router,
        "router_stride": 0 if router is None or router.dim() == 2 else router.stride(0),
        "ticket_ptr": ticket,
        **{f"{name}_ptr": getattr(state, name) for name in STATE},
        "heavy_ptr": state.heavy,
        "knobs_ptr": policy.knobs,
        "table_ptr": policy.table,
        "epsilon": float(scores.epsilon),
        "scale": float(scores.scale),
        **{f"{name}_ptr": tensor for name, tensor in zip(OUTPUTS, out.tensors(), strict=True)},
        "asked_ptr": out.asked,
        "T": tokens,
        "H": 0 if hidden is None else hidden.shape[2],
    }
    constants = {
        "E": experts,
        "C": slots,
        "K": top_k,
        "E_PAD": padded,
        "C_PAD": triton.next_power_of_2(slots),
        "EVICT": _jitted(evict),
        "EVICT_NAMED": _bits(words_of(evict), EVICT_WORDS),
        "LEVELS": state.levels,
        "ENDS": (0, *accumulate(state.cheaper)),  # of the slots before the cheaper levels' first, and of each
        "CHEAPER_PAD": triton.next_power_of_2(max(len(state.cheaper), 1)),
        "FUNCTION": scores.function,
        "RENORMALISE": scores.renormalise,
        "GROUPS": scores.groups,
        "TOP_GROUPS": scores.top_groups,
        "BEST_TWO": scores.group_score == "best-two",
        "GROUPS_PAD": triton.next_power_of_2(scores.groups),
        "GROUP_PAD": triton.next_power_of_2(experts // scores.groups),
        "KEY": policy.key and _jitted(policy.key),
        "GRADE": policy.grade and _jitted(policy.grade),
        "WORDS": _bits(policy.words),
        "GRADE_WORDS": _bits(policy.grade_words),
        "BOUNDED": policy.bounded,
        "SWAPS": policy.swaps,
        "OF_RUNNING": policy.renormalises,
        "NOISE_BITS": _jitted(noise_bits),
        "KNOBS": len(KNOBS),
        "CHUNK": max(1, 512 * num_warps // padded),  # larger tiles of ranks spill
        "BLOCK_H": 1024,
    }
    return Launch(
        _route_kernel,
        (caches,) if gate is None else (caches, experts),
        arguments,
        constants,
        max_registers=255,  # a program a cache: there are no others to make room for
        num_warps=num_warps,
        fuses=policy.knobs is None,  # a fused multiply and add would round a policy's numbers otherwise than elsewhere
    )
