"""What ``cachemoe info --predict`` shows: a row a pool, and in sentences where the figures come from."""

from rich.table import Table

from cachemoe.moe.sizes import size_text
from cachemoe.moe.terminal import table_of

HEADINGS = ("slots of\na layer", "memory", "misses", "a token reads\nfrom disk", "from\nmemory", "ms a\ntoken")


def predict_table(report: dict) -> Table:
    """The prediction of each pool."""
    model = report["model"]
    dense = "as they are" if model["dense"] is None else f"in {model['dense']}"
    title = f"Predicted, on the CPU: {model['pages']} pages, all other weights {dense}"
    table = table_of(title, "pool", (*HEADINGS, "tokens a\nsecond"))
    for row in report["rows"]:
        least, most = min(row["slots"]), max(row["slots"])
        table.add_row(
            row["pool"],
            f"{least}" if least == most else f"{least}-{most}",
            size_text(row["pool_bytes"]),
            f"{row['miss_rate']:.1%}",
            size_text(row["disk_bytes_per_token"]),
            size_text(row["memory_bytes_per_token"]),
            f"{row['ms_per_token']:.3g}",
            f"{row['tokens_per_second']:.3g}",
        )
    return table


def predict_words(report: dict) -> list[str]:
    """What was measured, and where the misses are from, a sentence or two each."""
    speeds, page, threads = report["speeds"], report["sizes"]["page_bytes"], report["machine"]["torch_threads"]
    disk = ", ".join(
        f"{size_text(count * page / seconds)}/s ({count} {'page' if count == 1 else 'pages'} at once)"
        for count, seconds in speeds["landing"]["seconds"].items()
    )
    memory = ", ".join(f"{kind} {size_text(speed)}/s" for kind, speed in speeds["dense"].items())
    words = [
        f"Measured here: disk {disk}; memory, as {threads} {'thread reads' if threads == 1 else 'threads read'} "
        f"weights, experts {size_text(speeds['experts'])}/s, others {memory}; beside weights, a token "
        f"{1e3 * speeds['token_s']:.3g} ms, and a layer that misses {1e3 * speeds['missing_s']:.3g} ms more."
    ]
    if not speeds["landing"]["direct"]:
        words.append(
            "The disk of the cache directory refuses reads past the page cache: what was measured may be memory, and a "
            "store that memory does not hold is slower."
        )
    if (lent := report["lent"]) is not None:
        words.append(
            f"The misses are lent: those of {lent['model']}, exactly routed with LRU on {lent['tokens']} tokens of "
            f"{lent['text']}, in pools of the same share of its experts. It is a small byte-level model, and a model "
            "with steeper favourites misses less; `cachemoe quality` measures yours, and --miss-rate takes it."
        )
    words.append(
        "A prompt is read faster a token, and a long context adds reading its keys and values, which is not counted."
    )
    return words
