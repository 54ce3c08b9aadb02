"""What ``cachemoe first-token`` prints: times by prompt, misses by model and text, and the starts side by side."""

from collections.abc import Iterator

from rich.table import Table

from cachemoe.benchmarks.first_token_misses import COLD, LEAST, MOST_USED, SAVED_OTHER, SAVED_SAME, WARM
from cachemoe.benchmarks.ratios import ratios, with_spread
from cachemoe.moe.sizes import size_text
from cachemoe.moe.terminal import table_of

NAMES = {MOST_USED: "most-used, simulated", LEAST: "best, in hindsight"}


def first_token_tables(report: dict) -> Iterator[Table]:
    """The tables of what ``run_first_token`` gives."""
    if report["times"] is not None:
        yield from _times(report["times"])
    yield from _misses(report["misses"])
    yield _beside_warm(report["misses"]["rows"])


def notes(report: dict) -> Iterator[str]:
    """What must be said beside the tables."""
    if (times := report["times"]) is not None:
        speed = size_text(times["disk_bytes_per_second"]["median"])
        yield (
            f"Times are medians of {times['rounds']} rounds (least-most), from the call with the prompt to the logits; "
            "llama.cpp's are by its own clock. Bound: the pages of the experts that the prompt used and the pool had "
            f"not, at the disk's {speed}/s. Saved residency: after {times['saved_tokens']} other tokens of prose."
        )
    misses = report["misses"]
    saved = f"{misses['saved_tokens']} other tokens"
    yield (
        f"Misses are means of {misses['windows']} windows (least-most), exactly routed: {misses['tokens']} tokens "
        f"decoded after a prompt of {misses['prompt_tokens']}. Every row has the same tokens and the same routing."
    )
    yield (
        f"{COLD}: an empty pool; the prompt did not go through it. {WARM}: the prompt did, in one call, which leaves "
        f"the experts used last, as stepping leaves them. {SAVED_SAME}: as {saved} of the text left it, {SAVED_OTHER}: "
        "as those of the other text did; the prompt did not go through it. "
        f"{MOST_USED}: what if a prompt left the experts that it used most. "
        f"{NAMES[LEAST]}: the least that LRU can miss, whoever is there at first."
    )


def _times(times: dict) -> Iterator[Table]:
    """A table for each prompt."""
    headings = "ms (least-most)", "of resident\n(spread)", "read", "bound,\nms"
    for length in dict.fromkeys(row["prompt_tokens"] for row in times["rows"]):
        dense = "" if times["dense"] is None else f", dense {times['dense']}"
        title = f"{times['model']}, {times['format']}{dense}: a prompt of {length} tokens to the first token"
        table = table_of(title, "way", headings)
        for row in times["rows"]:
            if row["prompt_tokens"] == length:
                moved = (size_text(row["bytes_read"]), f"{row['bound_ms']:.0f}") if row.get("bytes_read") else ("", "")
                ms = "{median:.0f} ({min:.0f}-{max:.0f})".format(**row["ms"])
                table.add_row(row["name"], ms, with_spread(row["of_resident"]), *moved)
        yield table


def _misses(misses: dict) -> Iterator[Table]:
    """A table for each model and text, two columns a pool."""
    rows = misses["rows"]
    pools = list(dict.fromkeys(row["pool"] for row in rows))
    headings = [heading for pool in pools for heading in (f"pool {pool}:\nmisses a token", "of\nselections")]
    for model, text in dict.fromkeys((row["model"], row["text"]) for row in rows):
        table = table_of(f"{model}, {text}: misses of the first {misses['tokens']} tokens", "pool begins", headings)
        for start in dict.fromkeys(row["start"] for row in rows):
            cells = []
            for pool in pools:
                (row,) = (each for each in rows if _key(each) == (model, text, pool, start))
                cells.append("{mean:.1f} ({min:.1f}-{max:.1f})".format(**row["misses_per_token"]))
                cells.append(f"{row['miss_rate']['mean']:.1%}")
            table.add_row(NAMES.get(start, start), *cells)
        yield table


def _beside_warm(rows: list[dict]) -> Table:
    """Every start's misses as a share of those after a prompt, window by window, of all models and texts."""
    pools = list(dict.fromkeys(row["pool"] for row in rows))
    table = table_of(f"misses, times those of {WARM}, window by window", "pool begins", (f"pool {p}" for p in pools))
    for start in dict.fromkeys(row["start"] for row in rows):
        cells = []
        for pool in pools:
            mine, warm = (
                [n for row in rows if (row["pool"], row["start"]) == (pool, which) for n in row["misses"]]
                for which in (start, WARM)
            )
            cells.append(with_spread(ratios(mine, warm)))
        table.add_row(NAMES.get(start, start), *cells)
    return table


def _key(row: dict) -> tuple[str, str, str, str]:
    return row["model"], row["text"], row["pool"], row["start"]
