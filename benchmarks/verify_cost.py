"""What it costs to hold every page against its checksum: decode at half of the experts, with and without, side by side.

    python -m cachemoe.benchmarks.verify_cost FOLDER

Each way of verifying has a pool of its own over the same store; they decode the same tokens in turns, in a new order
each round. Beside that, one page read by itself and one checksum by itself.
"""

import random
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Annotated

import torch
import typer
from rich.table import Table

from cachemoe.benchmarks.machine import describe
from cachemoe.benchmarks.ratios import ratio_table, ratios
from cachemoe.benchmarks.terminal import check_destination, console, one_sentence, save_report
from cachemoe.benchmarks.text import tokenized
from cachemoe.moe.checkpoint import TINYMOE
from cachemoe.moe.load import load
from cachemoe.moe.progress import Progress, show_progress
from cachemoe.offload.store import checksum

BASELINE = "off"
WAYS = ("read", BASELINE)
PREFIX, WARM_UP = 32, 4


def measure(folder: Path, pool: str, rounds: int, tokens: int, progress: Progress) -> dict:
    """Milliseconds a token of each way, and how many times as long as without checks it takes, round by round."""
    models = {way: load(folder, pool, verify=way, device="cpu", progress=progress) for way in WAYS}
    try:
        _, tokenizer = models[BASELINE]
        text = tokenized(None, tokenizer, rounds * (PREFIX + WARM_UP + tokens))
        windows = text.split(PREFIX + WARM_UP + tokens)
        seconds = {way: [] for way in WAYS}
        order, shuffle = list(WAYS), random.Random(0).shuffle
        with progress("decoding", rounds * len(WAYS)) as advance:
            for window in windows:
                shuffle(order)
                for way in order:
                    model = models[way][0]
                    model.cachemoe.reset_counters()
                    seconds[way].append(_decode(model, window))
                    advance()
        counters = models[BASELINE][0].cachemoe.counters
        engine = models[BASELINE][0].cachemoe.engine
        page_bytes = engine.page_format.page_bytes
        page = torch.empty(page_bytes, dtype=torch.uint8).numpy()
        store = engine._link._carrier._store
        pages = iter(range(10**9))
        return {
            "command": "verify_cost",
            "machine": describe(),
            "model": folder.resolve().name,
            "pool": pool,
            "rounds": rounds,
            "tokens": tokens,
            "page_bytes": page_bytes,
            "checksum_ms": _median_ms(lambda: checksum(page)),
            "read_ms": _median_ms(lambda: store.page(*divmod(next(pages) % store.pages, store.layout.experts))),
            "misses_per_token": counters.misses / (tokens + WARM_UP + 1),
            "rows": [
                {
                    "name": way,
                    "ms_per_token": statistics.median(times) * 1e3,
                    f"of_{BASELINE}": ratios(times, seconds[BASELINE]),
                    "seconds": times,
                }
                for way, times in seconds.items()
            ],
        }
    finally:
        for model, _ in models.values():
            model.cachemoe.close()


def _median_ms(run: Callable[[], object], times: int = 50) -> float:
    each = []
    for _ in range(times):
        start = perf_counter()
        run()
        each.append(perf_counter() - start)
    return statistics.median(each) * 1e3


@torch.inference_mode()
def _decode(model, text: torch.Tensor) -> float:
    """Median seconds of a token."""
    past = model(text[None, :PREFIX], use_cache=True).past_key_values
    times = []
    for token in text[PREFIX:]:
        start = perf_counter()
        model(token[None, None], past_key_values=past, use_cache=True)
        times.append(perf_counter() - start)
    return statistics.median(times[WARM_UP:])


def main(
    folder: Annotated[Path, typer.Argument(help="A checkpoint with a tokenizer.")] = TINYMOE,
    pool: Annotated[str, typer.Option(help="Of each way; both are in memory.")] = "50%",
    rounds: Annotated[int, typer.Option(min=3, help="How often each way decodes.")] = 9,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded on the clock each time.")] = 32,
    json_path: Annotated[Path, typer.Option("--json", help="Where every figure goes.")] = Path("results/verify.json"),
) -> None:
    """Decode with pages verified as they land, and without."""
    with one_sentence():
        check_destination(json_path)
        report = measure(folder, pool, rounds, tokens, show_progress)
        title = f"{report['model']}, pool {pool}: decode, pages verified on each read, and never"
        console.print(ratio_table(title, "verify", report["rows"], BASELINE))
        table = Table.grid(padding=(0, 2))
        table.add_row("one page", f"{report['page_bytes'] / 1e6:.2f} MB")
        table.add_row("read by one thread, checked", f"{report['read_ms']:.2f} ms")
        table.add_row("its checksum, XXH3", f"{report['checksum_ms']:.2f} ms")
        console.print(table)
        save_report(report, json_path)


if __name__ == "__main__":
    typer.run(main)
