"""The table of systems in the terminal: a table a model and text, and who loses to chance."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from cachemoe.benchmarks.ratios import with_spread
from cachemoe.benchmarks.systems_run import front_of

# (heading, text of a row, whether only rows that were decoded have one)
COLUMNS = (
    ("misses\na token", lambda r: f"{r['misses_per_token']:.1f}", False),
    ("drops", lambda r: f"{r['drops_per_token']:.1f}", False),
    ("swaps", lambda r: f"{r['swaps_per_token']:.1f}", False),
    ("cheap", lambda r: f"{r['cheap_per_token']:.1f}", False),
    ("MB a\ntoken", lambda r: f"{r['missed_bytes_per_token'] / 1e6:.2f}", False),
    ("k_eff", lambda r: f"{r['k_eff']:.2f}", False),
    ("ppl\n%", lambda r: f"{100 * r['perplexity_change']:+.1f}", False),
    ("KL\nnats", lambda r: f"{r['kl_nats']:.4f}", False),
    ("by\nchance", lambda r: "" if r["control_kl_nats"] is None else f"{r['control_kl_nats']:.4f}", False),
    ("agree\n%", lambda r: f"{100 * r['top1_agreement']:.1f}", False),
    ("ms\np50", lambda r: f"{r['ms_per_token']['p50']:.1f}", True),
    ("speed-up\n(spread)", lambda r: with_spread(r["speedup_over_original"]), True),
    ("stall\nms", lambda r: f"{r['stall_ms_per_token']:.1f}", True),
    ("ahead,\nMB", lambda r: f"{r['prefetched_bytes_per_token'] / 1e6:.2f}", True),
)


def tables(report: dict) -> list[Table]:
    """A table for each model and text; quality above all, speed beside it where it was measured."""
    made = []
    for run in report["runs"]:
        (capacity,) = run["capacities"]
        rows = [row for row in capacity["rows"] if "miss_rate" in row]
        timed = any("ms_per_token" in row for row in rows)
        title = (
            f"{run['model']['name']}, {run['settings']['text']}: {capacity['capacity']} of {run['model']['experts']} "
            f"experts' bytes in each layer\n"
            f"Belady on the original routing misses {100 * capacity['belady_miss_rate']:.1f} %"
        )
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
        table.add_column("system", no_wrap=True)
        columns = [column for column in COLUMNS if timed or not column[2]]
        for heading, _, _ in columns:
            table.add_column(heading, justify="right", no_wrap=True)
        front = front_of(rows)
        for row in rows:
            cells = ("" if speed and "ms_per_token" not in row else text(row) for _, text, speed in columns)
            table.add_row(row["name"], *cells, style="bold green" if row["name"] in front else None)
        for row in capacity["rows"]:
            if "miss_rate" not in row:
                cells = (text(row) if speed else "" for _, text, speed in columns)
                table.add_row(row["name"], *cells, style="dim")
        made.append(table)
    return made


def notes(report: dict) -> list[str]:
    """What must be said beside the tables."""
    said = [
        "Green: no other has fewer bytes a token and a lower perplexity. By chance: the divergence of as many drops, "
        "swaps, or experts at the cheaper level, chosen by chance. Misses, drops, swaps and cheap experts are of the "
        "scored text, all layers together; MB are their pages'.",
    ]
    for run in report["runs"]:
        (capacity,) = run["capacities"]
        loses = losers(capacity["rows"])
        if loses:
            said.append(f"{run['model']['name']}, {run['settings']['text']}: lose to chance: {', '.join(loses)}.")
        stepped = sorted({r["scored_tokens"] for r in capacity["rows"] if "miss_rate" in r})
        if len(stepped) > 1:
            said.append(
                f"{run['model']['name']}, {run['settings']['text']}: systems whose layers share a cache were stepped "
                f"token by token on the first {stepped[0]} of {stepped[-1]} scored tokens; their changes are against "
                "the unmodified model on the same."
            )
    return list(dict.fromkeys(said))


def losers(rows: Sequence[dict]) -> list[str]:
    """Those that diverge more than as many changes by chance do."""
    compared = [row for row in rows if row.get("control_kl_nats") is not None]
    return [row["name"] for row in compared if row["kl_nats"] > row["control_kl_nats"]]
