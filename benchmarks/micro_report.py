"""The microbenchmarks' report in the terminal: a table a kernel and geometry, and what must be known beside it."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from cachemoe.benchmarks.geometries import GEOMETRIES
from cachemoe.benchmarks.micro_figures import IN_TURN, MATMUL, MEMORY, PINNED
from cachemoe.benchmarks.timing import QUEUED

BOUNDS = {MEMORY: "memory", PINNED: "link", MATMUL: "matmul", IN_TURN: "memory + link"}
HEADINGS = ("", "us", "least", "most", "GB/s", "%")


def micro_tables(report: dict) -> list[Table]:
    """One table for each kernel, geometry, number of tokens and variant, fastest first."""
    groups: dict[tuple, list[dict]] = {}
    for row in report["rows"]:
        groups.setdefault((row["kernel"], row["geometry"], row["tokens"], row["variant"]), []).append(row)
    return [_table(rows) for rows in groups.values()]


def _table(rows: Sequence[dict]) -> Table:
    table = Table(title=_title(rows), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in sorted(rows, key=lambda row: row["seconds"]["median"]):
        table.add_row(*_cells(row), style="bold" if row["implementation"] == "cachemoe" else None)
    return table


def _title(rows: Sequence[dict]) -> str:
    """What the rows of a table share."""
    row = rows[0]
    title = f"{row['kernel']}, {GEOMETRIES[row['geometry']].title}, T = {row['tokens']}, {row['variant']}"
    if row["bound_seconds"] is None:
        return title
    bound = f"{title}\n{row['bytes'] / 1e6:.1f} MB, bound {_us(row['bound_seconds'])} us ({BOUNDS[row['bound_by']]})"
    expected = [f", cachemoe by model {_us(row['model_seconds'])} us" for row in rows if row["model_seconds"]]
    return bound + "".join(expected)


def _cells(row: dict) -> list[str]:
    queued = "*" if row["timing"] == QUEUED else ""
    times = [_us(row["seconds"][name]) for name in ("median", "min", "max")]
    bounded = row["bound_seconds"] is not None
    rates = [f"{row['bytes_per_second'] / 1e9:.1f}", f"{row['percent_of_bound']:.0f}"] if bounded else ["", ""]
    return [f"{row['implementation']}{queued}", *times, *rates]


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.{1 if seconds < 1e-3 else 0}f}"


def micro_notes(report: dict) -> list[str]:
    """What a reader must know beside the tables."""
    machine, speeds = report["machine"], report["speeds"]
    gpu = machine["gpu"]
    how = "device copy, read and write" if gpu else _read(speeds)
    said = [
        f"Machine: {gpu['name'] if gpu else machine['processor']}, {machine['torch_threads']} threads. Measured in "
        f"this run: memory {speeds[MEMORY] / 1e9:.1f} GB/s ({how}), "
        f"bfloat16 matmul {speeds[MATMUL] / 1e12:.2f} TFLOP/s"
        + (f", pinned memory to the device {speeds[PINNED] / 1e9:.1f} GB/s." if PINNED in speeds else "."),
        "Times are the median of the repetitions' medians, with the least and the greatest; every implementation of a "
        "table ran once, then all again, those that torch compiles after everything else. The bound, which % is of, is "
        "the bytes of weights, or the matmuls' operations where those take longer, at the speeds above. Calls of one "
        "token take turns over more experts than a cache holds.",
    ]
    if any(row["bound_by"] == IN_TURN for row in report["rows"]):
        said.append(
            "memory + link: the sum of both times, as if hits and misses took turns; both at once may be faster."
        )
    if any(row["timing"] == QUEUED for row in report["rows"]):
        said.append("*: waits for the GPU, so no graph can hold it; queued call by call, launches included.")
    return said + report["notes"]


def _read(speeds: dict) -> str:
    """How a CPU's memory was measured, and how much that varied."""
    samples = [sample / 1e9 for sample in speeds.get("memory_samples", [])]
    return f"read; the median of {len(samples)}, {min(samples):.1f}-{max(samples):.1f}" if samples else "read"
