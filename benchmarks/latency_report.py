"""The latency report: every figure of a capacity as a dictionary for JSON."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict

import torch

from cachemoe.benchmarks.latency_decode import FREE_MISSES, IN_A_GRAPH, ORIGINAL, RESIDENT, Decode
from cachemoe.moe.quality import NATS_PER_BIT, Evaluation, Quality, Setting


def capacity_report(
    capacity: int,
    experts: int,
    rows: Sequence[Decode],
    settings: Sequence[Setting],
    evaluation: Evaluation,
    speeds: dict,
    pages: Sequence[int],
) -> dict:
    """Everything measured at one capacity.

    Args:
        rows: as ``decode_rows`` left them; none where only quality was measured.
        settings: the evaluation's, in its order.
        speeds: of the machine: ``link_bytes_per_second`` and ``memory_bytes_per_second``.
        pages: bytes of each level's.
    """
    quality = {str(s.strategy): q for s, q in zip(settings, evaluation.settings, strict=True) if s.capacity == capacity}
    belady = evaluation.belady_miss_rate(capacity)
    layers, _, k = evaluation.original_ids.shape
    about = {
        "capacity": capacity,
        "capacity_fraction": capacity / experts,
        "belady_miss_rate": belady,
        "belady_bytes_per_token": belady * layers * k * pages[0],
    }
    if not rows:
        here = [s.strategy for s in settings if s.capacity == capacity]
        named = ({"name": str(s), "strategy": str(s), "label": s.label} for s in here)
        return about | {"rows": [n | _quality(quality[n["name"]], evaluation.unmodified, pages) for n in named]}
    by_name = {row.name: row for row in rows}
    original, resident = by_name[str(ORIGINAL)], by_name[RESIDENT]
    report = []
    for row in rows:
        strategy = str(row.setting.strategy)
        entry = {"name": row.name, "strategy": strategy, "label": row.setting.strategy.label, "prefetch": row.prefetch}
        entry["in_a_graph"] = IN_A_GRAPH in row.name
        # A row in a graph is held to everything resident in a graph.
        like = by_name[f"{RESIDENT} {IN_A_GRAPH}"] if IN_A_GRAPH in row.name else resident
        entry |= _speed(row, original, like) | _movement(row, like, speeds)
        if not row.name.startswith((RESIDENT, FREE_MISSES)):
            entry |= _quality(quality[strategy], evaluation.unmodified, pages)
        report.append(entry)
    return about | {"rows": report}


def _speed(row: Decode, original: Decode, resident: Decode) -> dict:
    seconds = [s for segment in row.seconds for s in segment]
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    counters = row.counters
    speedups = _ratios(original, row)
    return {
        "tokens": len(seconds),
        "ms_per_token": {"p50": statistics.median(seconds) * 1e3, "p95": cuts[18] * 1e3},
        "tokens_per_second": len(seconds) / sum(seconds),
        "speedup_over_original": {"median": statistics.median(speedups), "min": min(speedups), "max": max(speedups)},
        "fraction_of_resident_speed": statistics.median(_ratios(resident, row)),
        "bytes_per_token": counters.bytes_read / len(seconds),
        "cheap_bytes_per_token": counters.cheap_bytes / len(seconds),
        "prefetched_bytes_per_token": counters.prefetched_bytes / len(seconds),
        "background_bytes_per_token": counters.background_bytes / len(seconds),
        "decode_miss_rate": counters.misses / counters.selections,
        "decode_swapped": counters.swaps / counters.selections,
        "decode_cheap": counters.cheap / counters.selections,
        "admissions_per_token": counters.admissions / len(seconds),
        # Driven by the device, no part can be told from another.
        "us_per_layer": None
        if IN_A_GRAPH in row.name
        else {
            "engine": counters.engine_s / counters.calls * 1e6,
            "compute": counters.compute_s / counters.calls * 1e6,
            "link": counters.link_s / counters.calls * 1e6,
            "stall": counters.stall_s / counters.calls * 1e6,
            "route": row.route_s / counters.calls * 1e6,
        },
        "link_bytes_per_second": counters.bytes_read / counters.link_s if counters.link_s else None,
        "counters": asdict(counters),
        "seconds": row.seconds,
    }


def _movement(row: Decode, resident: Decode, speeds: dict) -> dict:
    """How well pages moved: what was waited for, what was hidden, and how far from what cannot be beaten.

    The bound of a token is that of its bytes, over the link or out of memory, whichever takes longer, and then the time
    that the resident row spends outside its experts.
    """
    counters, page_bytes = row.counters, row.engine.page_format.page_bytes
    tokens, seconds = (sum(f(segment) for segment in row.seconds) for f in (len, sum))
    full, *cheaper = (page_format.weight_bytes for page_format in row.engine.formats)
    read = (counters.selections * full + counters.cheap * (max(cheaper, default=full) - full)) / tokens
    resident_tokens, resident_s = (sum(f(segment) for segment in resident.seconds) for f in (len, sum))
    # What the host only queues it cannot time: there, the experts' share is by their measured speed.
    compute_s = resident.counters.compute_s / resident_tokens
    if not compute_s:
        all_read = resident.counters.selections / resident_tokens * row.engine.page_format.weight_bytes
        compute_s = all_read / speeds["resident_expert_bytes_per_second"]
    # The share that is not the experts', of a median token: one slow moment would raise every row's bound.
    dense = max(0.0, 1 - compute_s / (resident_s / resident_tokens))
    dense_s = dense * statistics.median(s for segment in resident.seconds for s in segment)
    needed = counters.bytes_read - counters.background_bytes if cheaper else counters.misses * page_bytes
    missed_s = needed / tokens / speeds["link_bytes_per_second"]
    bound_s = max(missed_s if counters.pages_read else 0.0, read / speeds["memory_bytes_per_second"]) + dense_s
    useful = 1 - counters.wasted_prefetches / counters.pages_read if counters.pages_read else 1.0
    moved = {
        # Driven by the device, what waits for a page is part of a kernel.
        "stall_ms_per_token": None if IN_A_GRAPH in row.name else counters.stall_s / tokens * 1e3,
        # Of the time that needed pages took: what was fetched for nothing hides nothing.
        "overlap": max(0.0, 1 - counters.stall_s / (counters.link_s * useful)) if counters.link_s else None,
        "link_fraction": counters.bytes_read / seconds / speeds["link_bytes_per_second"],
        "bound_ms_per_token": bound_s * 1e3,
        "times_bound": seconds / tokens / bound_s,
    }
    if not counters.prefetches and not counters.predicted:
        return moved
    used = counters.prefetch_hits + counters.late_prefetches
    return moved | {
        "precision": counters.predicted_right / counters.predicted if counters.predicted else None,
        "recall": counters.predicted_right / counters.selections,  # where nothing was predicted, nothing was right
        "prefetches_per_token": counters.prefetches / tokens,
        "prefetches_used": used / counters.prefetches if counters.prefetches else None,
        "misses_prefetched": used / counters.misses if counters.misses else None,
        "prefetches_timely": counters.prefetch_hits / used if used else None,
        "wasted_bytes_per_token": counters.wasted_prefetches / tokens * page_bytes,
    }


def _ratios(slow: Decode, fast: Decode) -> list[float]:
    """How many times faster, segment by segment: both decoded the same tokens, one after the other."""
    return [sum(a) / sum(b) for a, b in zip(slow.seconds, fast.seconds, strict=True)]


def _quality(quality: Quality, unmodified: Quality, pages: Sequence[int]) -> dict:
    windows, changed = len(quality.nats), quality.changes
    same = unmodified.nats[:windows]  # of a shorter text, where the setting was stepped on one
    more = [a - b for a, b in zip(quality.nats, same, strict=True)]
    bits = [each / NATS_PER_BIT for each in more]
    # torch's, since statistics.stdev raises where one is not finite.
    deviation = float(torch.tensor(bits, dtype=torch.float64).std()) if windows > 1 else None
    routed = changed.selections / (quality.top_k * quality.layers)  # tokens, a window's first among them
    missed = [(all_levels - cheap) * pages[0] + cheap * pages[-1] for all_levels, cheap in quality.missed]
    return quality.costs(unmodified) | {
        "misses_per_token": quality.misses / routed,
        "drops_per_token": changed.drops / routed,
        "swaps_per_token": changed.swaps / routed,
        "cheap_per_token": (changed.cheap + changed.cheap_best) / routed,
        "missed_bytes_per_token": sum(missed) / routed,
        "windows": {"missed_bytes": missed, "nats_more": more},  # than the unmodified model's
        "bits_per_byte": quality.bits_per_byte,
        "bits_per_byte_change": sum(bits) / quality.tokens,
        "bits_per_byte_change_standard_error": deviation and deviation * windows**0.5 / quality.tokens,
    }
