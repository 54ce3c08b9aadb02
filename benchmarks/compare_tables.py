"""What ``cachemoe compare`` prints: the ways with everything in memory, and those in less."""

from collections.abc import Iterator

from rich.table import Table

from cachemoe.benchmarks.ratios import with_spread
from cachemoe.moe.sizes import size_text
from cachemoe.moe.terminal import table_of

HEADINGS = "ms a token", "of the first\n(spread)", "misses", "prompt,\ntokens/s"


def compare_tables(report: dict) -> Iterator[Table]:
    """A table for the ways of each limit, from what ``compare`` gives."""
    for limited in (False, True):
        rows = [row for row in report["rows"] if row["limited"] == limited]
        if not rows:
            continue
        title = f"{report['model']}, {report['format']}: everything in memory"
        if limited:
            sizes = " or ".join(dict.fromkeys(size_text(row["limit_bytes"]) for row in rows))
            title = f"{report['model']}, {size_text(report['weights_bytes'])} of weights in {sizes}"
        table = table_of(title, "way", HEADINGS)
        for row in rows:
            if "failed" in row:
                table.add_row(row["name"], row["failed"])
                continue
            misses = [run["miss_rate"] for run in row["runs"] if "miss_rate" in run]
            table.add_row(
                row["name"],
                f"{row['ms_per_token']:.1f}",
                with_spread(row["of_first"]),
                f"{sum(misses) / len(misses):.1%}" if misses else "",
                f"{row['prompt_tokens_per_second']:.0f}",
            )
        yield table
