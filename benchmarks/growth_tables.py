"""What ``cachemoe growth`` prints: a table an axis, one of each model's batches, and what must be said beside them."""

from collections.abc import Iterator

from rich.table import Table

from cachemoe.benchmarks.growth_points import ALL
from cachemoe.benchmarks.ratios import with_spread
from cachemoe.moe.terminal import table_of

NAMES = {
    "context": "tokens before",
    "experts": "experts a layer",
    "layers": "layers",
    "batch": "sequences",
    "pool": "pool",
}
HEADINGS = (
    *("ms a step\n(spread)", "ms of\na token", "bound,\nms", "times\nbound", "experts\na layer", "memory,\nMB"),
    "disk,\nMB",
)


def growth_tables(report: dict) -> Iterator[Table]:
    """A table for each axis, and for each model's batches, from what ``run_growth`` gives."""
    for axis, rows in report["axes"].items():
        table = table_of(f"Decode by {axis}", NAMES[axis], HEADINGS)
        for row in rows:
            table.add_row(
                str(row["value"]),
                with_spread(row["ms_per_step"]),
                f"{row['ms_per_token']:.2f}",
                f"{row['bound_ms']:.2f}",
                f"{row['of_bound']['median']:.2f}",
                f"{row['unique_experts']:.1f}",
                f"{row['memory_bytes'] / 1e6:.1f}",
                f"{row['disk_bytes'] / 1e6:.2f}",
            )
        yield table
    for counts in report["batches"]:
        yield _batches(counts)
    for measured in report["batch_quality"]:
        yield _quality(measured)


def _batches(counts: dict) -> Table:
    resident = next(each for each in counts["pools"] if each["pool"] == ALL)
    others = [each for each in counts["pools"] if each is not resident]
    title = f"{counts['model']}, {counts['format']}: {counts['top_k']} of {counts['experts']} experts a token"
    headings = ["experts\na layer", "by\nchance", "memory,\nMB", *(f"disk, MB,\nat {each['pool']}" for each in others)]
    table = table_of(title, "sequences", headings)
    for i, row in enumerate(resident["rows"]):
        table.add_row(
            str(row["sequences"]),
            f"{row['unique_experts']:.2f}",
            f"{row['unique_experts_by_chance']:.2f}",
            f"{row['memory_bytes'] / 1e6:.2f}",
            *(f"{each['rows'][i]['disk_bytes'] / 1e6:.2f}" for each in others),
        )
    return table


def _quality(measured: dict) -> Table:
    title = f"{measured['model']}: each sequence in a batch against alone, {measured['routing']}, {measured['pool']}"
    table = table_of(title, "sequences", ("bits a\ntoken", "more than\nalone", "least", "most", "misses\na step"))
    for row in measured["rows"]:
        more = row["more_than_alone"]
        cells = [f"{row['mean_bits_per_token']:.4f}", *(f"{more[each]:+.4f}" for each in ("mean", "min", "max"))]
        table.add_row(str(row["sequences"]), *cells, f"{row['misses_per_step']:.1f}")
    return table


def growth_notes(report: dict) -> Iterator[str]:
    """What was measured, and how bounds are made."""
    base, speeds = report["base"], report["speeds"]
    yield (
        f"Where an axis does not say otherwise: {base['layers']} layers of {base['experts']} experts, H = "
        f"{base['hidden']}, I = {base['intermediate']}, {base['context']} tokens before, one sequence, everything "
        f"resident. {base['top_k']} experts a token; {report['format']}, dense {report['dense'] or 'as it is'}; exact "
        "routing."
    )
    yield (
        f"The bound: what a step reads, at {speeds['memory_bytes_per_second'] / 1e9:.1f} GB/s from memory and "
        f"{speeds['disk_bytes_per_second'] / 1e9:.2f} GB/s from the disk, as measured here, one after the other. What "
        "the processor's cache keeps, and pages that come while residents are computed, cost less than that."
    )
    if report["batches"]:
        yield (
            "Experts a layer: the unique ones of a step, whose sequences read different prose. By chance: those of as "
            "many tokens that draw theirs evenly."
        )
