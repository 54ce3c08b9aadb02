"""The microbenchmarks' report in the terminal: a table a kernel and geometry, and what must be known beside it."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from cachemoe.benchmarks.geometries import GEOMETRIES
from cachemoe.benchmarks.micro import MATMUL, MEMORY, PINNED

BOUNDS = {MEMORY: "memory", PINNED: "link", MATMUL: "matmul"}
HEADINGS = ("", "us", "least", "most", "MB", "GB/s", "bound", "by", "% of it", "timing")


def micro_tables(report: dict) -> list[Table]:
    """One table for each kernel, geometry and number of tokens, fastest first within a variant."""
    groups: dict[tuple, list[dict]] = {}
    for row in report["rows"]:
        groups.setdefault((row["kernel"], row["geometry"], row["tokens"]), []).append(row)
    return [_table(*key, rows) for key, rows in groups.items()]


def _table(kernel: str, geometry: str, tokens: int, rows: Sequence[dict]) -> Table:
    table = Table(
        title=f"{kernel}, {GEOMETRIES[geometry].title}, T = {tokens}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("", "by", "timing") else "right", no_wrap=True)
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for row in sorted(rows, key=lambda row: (variants.index(row["variant"]), row["seconds"]["median"])):
        table.add_row(*_cells(row), style="bold" if row["implementation"] == "cachemoe" else None)
    return table


def _cells(row: dict) -> list[str]:
    cells = [
        f"{row['variant']}: {row['implementation']}",
        *(_us(row["seconds"][name]) for name in ("median", "min", "max")),
    ]
    cells += [f"{row['bytes'] / 1e6:.1f}", f"{row['bytes_per_second'] / 1e9:.1f}"] if row["bytes"] else ["", ""]
    if row["bound_seconds"] is None:
        cells += ["", "", ""]
    else:
        cells += [_us(row["bound_seconds"]), BOUNDS[row["bound_by"]], f"{row['percent_of_bound']:.0f}"]
    return [*cells, row["timing"]]


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.{1 if seconds < 1e-3 else 0}f}"


def micro_notes(report: dict) -> list[str]:
    """What a reader must know beside the tables."""
    machine, speeds = report["machine"], report["speeds"]
    gpu = machine["gpu"]
    said = [
        f"Machine: {gpu['name'] if gpu else machine['processor']}, {machine['torch_threads']} threads. Measured in "
        f"this run: memory {speeds[MEMORY] / 1e9:.1f} GB/s ({'device copy, read and write' if gpu else 'read'}), "
        f"bfloat16 matmul {speeds[MATMUL] / 1e12:.2f} TFLOP/s"
        + (f", pinned memory to the device {speeds[PINNED] / 1e9:.1f} GB/s." if PINNED in speeds else "."),
        "Times are the median of the repetitions' medians, with the least and the greatest; every implementation of a "
        "variant ran once, then all again. The bound is the bytes of weights, or the matmuls' operations where those "
        "take longer, at the speeds above. Calls of one token take turns over more experts than a cache holds.",
    ]
    return said + report["notes"]
