"""The quality report as tables, one a capacity."""

from rich.table import Table

from cachemoe.moe.terminal import table_of

# What a routing costs; the latency tables show the same.
COST_COLUMNS = (
    ("k_eff", lambda r: f"{r['k_eff']:.2f}"),
    ("ppl", lambda r: f"{r['perplexity']:.3f}"),
    ("change\n%", lambda r: f"{round(100 * r['perplexity_change'], 1) + 0.0:+.1f}"),
    ("KL\nnats", lambda r: f"{round(r['kl_nats'], 4) + 0.0:.4f}"),
    ("agree\n%", lambda r: f"{100 * r['top1_agreement']:.1f}"),
)
# The divergence of as many drops, swaps and cheap experts by chance.
CHANCE_COLUMN = ("KL by\nchance", lambda r: "" if r["control"] is None else f"{r['control']['kl_nats']:.4f}")
CHANGED_COLUMN = ("changed", lambda r: r["label"].removesuffix(" changed"))
COLUMNS = (
    ("miss\n%", lambda r: f"{100 * r['miss_rate']:.1f}"),
    ("swap\n%", lambda r: f"{100 * r['experts_swapped']:.1f}"),
    *COST_COLUMNS,
    CHANCE_COLUMN,
    CHANGED_COLUMN,
)


def quality_table(report: dict) -> list[Table]:
    """A table for each capacity of a report that ``run_quality`` made."""
    made, model = [], report["model"]
    for capacity in dict.fromkeys(row["capacity"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["capacity"] == capacity]
        title = (
            f"{model['name']} ({model['pages']} pages), {report['tokens']} tokens of {report['text']}: {capacity} of "
            f"{model['experts']} experts resident in each layer\nUnmodified: perplexity "
            f"{report['unmodified']['perplexity']:.3f}. Belady on the original routing misses "
            f"{100 * rows[0]['belady_miss_rate']:.1f} %"
        )
        if fewer := [row for row in rows if row["scored_tokens"] < report["tokens"]]:
            title += (
                f"\nOf the first {fewer[0]['scored_tokens']} tokens alone, as are their changes: "
                f"{', '.join(row['strategy'] for row in fewer)}"
            )
        table = table_of(title, "strategy", (heading for heading, _ in COLUMNS), CHANGED_COLUMN[:1])
        for row in rows:
            table.add_row(row["strategy"].replace(",", ",\n"), *(text(row) for _, text in COLUMNS))
        made.append(table)
    if report["free_running"]:
        made.append(free_running_table(report))
    return made


def free_running_table(report: dict) -> Table:
    """Excess bits of each row, with the interval of its mean, and those of as much by chance."""
    run, share = report["free_running"], round(100 * report["free_running"]["interval_share"])
    title = (
        f"Free-running: {run['tokens']} tokens, greedily, after each of {run['prompts']} prompts of "
        f"{run['prompt_tokens']}\nUnder the unmodified model its own have {run['own_bits']:.3f} bits a token; those of "
        "others\nexceed that by so much, with the interval of the mean by bootstrap"
    )
    headings = ("slots", "excess\nbits", f"{share} %", "bits by\nchance", f"{share} %")
    table = table_of(title, "strategy", headings)
    for row in report["rows"]:
        costs = row["free_running"]
        cells = ("exact",) if costs is None else (*_excess(costs), *_excess(costs["control"]))
        table.add_row(row["strategy"].replace(",", ",\n"), str(row["capacity"]), *cells)
    return table


def _excess(figures: dict | None) -> tuple[str, str]:
    if figures is None:
        return "", ""
    low, high = figures["interval"]
    return f"{figures['excess_bits']:+.3f}", f"{low:+.3f} to {high:+.3f}"
