"""The table of systems in the terminal: a table a model and text, and who loses to chance."""

import math
from collections.abc import Sequence

from rich.table import Table

from cachemoe.benchmarks.payload import NATIVE
from cachemoe.benchmarks.ratios import with_spread
from cachemoe.benchmarks.systems_run import front_of
from cachemoe.moe.quality_report import CHANCE_COLUMN, COST_COLUMNS, free_running_table
from cachemoe.moe.terminal import table_of

_COST = dict(COST_COLUMNS)  # by heading, which are narrower here
BETTER, UNDECIDED, WORSE = "better than chance", "not told from chance", "lose to chance"
# (heading, text of a row)
QUALITY = (
    ("miss", lambda r: f"{r['misses_per_token']:.1f}"),
    ("drop", lambda r: f"{r['drops_per_token']:.1f}"),
    ("swap", lambda r: f"{r['swaps_per_token']:.1f}"),
    ("cheap", lambda r: f"{r['cheap_per_token']:.1f}"),
    ("MB", lambda r: f"{r['missed_bytes_per_token'] / 1e6:.1f}"),
    ("k\neff", _COST["k_eff"]),
    ("ppl\n%", _COST["change\n%"]),
    ("KL\nnats", _COST["KL\nnats"]),
    ("by\nchance", CHANCE_COLUMN[1]),
    ("agree\n%", _COST["agree\n%"]),
)
SPEED = (
    ("ms\np50", lambda r: f"{r['ms_per_token']['p50']:.1f}"),
    ("speed-up\n(spread)", lambda r: with_spread(r["speedup_over_original"])),
    ("stall\nms", lambda r: f"{r['stall_ms_per_token']:.1f}"),
    ("MB", lambda r: f"{r['bytes_per_token'] / 1e6:.1f}"),
    ("of them\ncheap", lambda r: f"{r['cheap_bytes_per_token'] / 1e6:.1f}"),
    ("ahead,\nMB", lambda r: f"{r['prefetched_bytes_per_token'] / 1e6:.1f}"),
)


def tables(report: dict) -> list[Table]:
    """A table for each model and text of what every system saves and costs; of its speed, and of the front's
    free-running, where they were measured."""
    made = []
    for run in report["runs"]:
        (capacity,) = run["capacities"]
        rows = [row for row in capacity["rows"] if "miss_rate" in row]
        timed = [row for row in capacity["rows"] if "ms_per_token" in row]
        title = (
            f"{run['model']['name']}, {run['settings']['text']}: {capacity['capacity']} of {run['model']['experts']} "
            f"experts' bytes in each layer\n"
            f"Belady on the original routing misses {100 * capacity['belady_miss_rate']:.1f} %"
        )
        front = front_of(rows)
        made.append(_table(title, QUALITY, rows, front))
        if timed:
            made.append(_table(f"{run['model']['name']}, decoded on the clock", SPEED, timed, front))
        if "free_running" in run:
            made.append(free_running_table(run["free_running"]))
    return made


def _table(title: str, columns: Sequence[tuple], rows: Sequence[dict], front: Sequence[str]) -> Table:
    table = table_of(title, "system", (heading for heading, _ in columns))
    for row in rows:
        style = "bold green" if row["name"] in front else None if "miss_rate" in row else "dim"
        table.add_row(row["name"], *(text(row) for _, text in columns), style=style)
    return table


def notes(report: dict) -> list[str]:
    """What must be said beside the tables."""
    said = [
        "Green: no other has fewer bytes a token and a lower perplexity. By chance: the divergence of as many drops, "
        "swaps and experts at the cheaper level, chosen by chance. Misses, drops, swaps, cheap experts and MB, the "
        "missed pages', are a token's, all layers together: of the scored text, or of the tokens decoded on the clock.",
    ]
    if report["settings"]["payload"] != NATIVE:
        said.append(
            "Surrogates take of the pool's bytes the share that the model's own take beside its pages, whatever the "
            "payload's format."
        )
    for run in report["runs"]:
        (capacity,) = run["capacities"]
        where = f"{run['model']['name']}, {run['settings']['text']}"
        for verdict, names in against_chance(capacity["rows"]).items():
            if names and verdict != BETTER:
                said.append(f"{where}: {verdict}: {', '.join(names)}.")
        stepped = sorted({r["scored_tokens"] for r in capacity["rows"] if "miss_rate" in r})
        if len(stepped) > 1:
            said.append(
                f"{where}: systems whose layers share a cache were stepped token by token on the first {stepped[0]} of "
                f"{stepped[-1]} scored tokens; what is said of them is of these, and the front compares any two on the "
                "tokens of both."
            )
    return list(dict.fromkeys(said))


def against_chance(rows: Sequence[dict]) -> dict[str, list[str]]:
    """By verdict, the systems that have a control: whether they diverge less, or more, than as many changes by chance.

    What lies within two standard errors of the difference is neither, and so is what is not finite.
    """
    verdicts = {BETTER: [], UNDECIDED: [], WORSE: []}
    for row in rows:
        if control := row.get("control"):
            more, error = control["kl_difference"], control["kl_difference_standard_error"]
            told = error is not None and math.isfinite(error) and abs(more) > 2 * error
            verdicts[UNDECIDED if not told else WORSE if more > 0 else BETTER].append(row["name"])
    return verdicts
