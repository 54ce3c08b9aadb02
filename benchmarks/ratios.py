"""Times of one thing as ratios of another's, round by round, with their spread."""

import statistics
from collections.abc import Sequence

from rich import box
from rich.table import Table


def ratios(times: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """``median``, ``min`` and ``max`` of how many times as long the rounds took as the baseline's."""
    each = [a / b for a, b in zip(times, baseline, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def ratio_rows(seconds: dict[str, list[float]], baseline: str) -> list[dict]:
    """Of each implementation's seconds a token, round by round, the row that ``ratio_table`` shows."""
    return [
        {
            "name": name,
            "ms_per_token": statistics.median(times) * 1e3,
            f"of_{baseline}": ratios(times, seconds[baseline]),
            "seconds": times,
        }
        for name, times in seconds.items()
    ]


def with_spread(ratio: dict[str, float]) -> str:
    """What ``ratios`` gives, as text."""
    return "{median:.2f} ({min:.2f}-{max:.2f})".format(**ratio)


def ratio_table(title: str, what: str, rows: Sequence[dict], baseline: str) -> Table:
    """A line for each row: its ``name``, ``ms_per_token`` and ``of_<baseline>``."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for heading in (what, "ms a token", f"of {baseline} (spread)"):
        table.add_column(heading, justify="left" if heading == what else "right", no_wrap=True)
    for row in rows:
        table.add_row(row["name"], f"{row['ms_per_token']:.2f}", with_spread(row[f"of_{baseline}"]))
    return table
