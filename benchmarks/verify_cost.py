"""What it costs to hold every page against its checksum: decode at half of the experts, with and without, side by side.

    python -m cachemoe.benchmarks.verify_cost FOLDER

Each way of verifying has a pool of its own over the same store; they decode the same tokens in turns, in a new order
each round. Beside that, one page read by itself and one checksum by itself.
"""

import random
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer
from rich.table import Table

from cachemoe.benchmarks.ratios import ratio_table, ratios
from cachemoe.benchmarks.swap_overhead import PREFIX, WARM_UP, decode_seconds
from cachemoe.moe.checkpoint import TINYMOE, Checkpoint
from cachemoe.moe.load import load
from cachemoe.moe.machine import describe
from cachemoe.moe.pack import open_packed
from cachemoe.moe.progress import Progress, show_progress
from cachemoe.moe.terminal import check_destination, console, one_sentence, save_report
from cachemoe.moe.text import tokenized
from cachemoe.offload.store import checksum

BASELINE = "off"
WAYS = ("read", BASELINE)


def measure(folder: Path, pool: str, rounds: int, tokens: int, progress: Progress) -> dict:
    """Milliseconds a token of each way, and how many times as long as without checks it takes, round by round."""
    with ExitStack() as stack:
        models = {way: load(folder, pool, verify=way, device="cpu", progress=progress) for way in WAYS}
        for model, _ in models.values():
            stack.callback(model.cachemoe.close)
        _, tokenizer = models[BASELINE]
        text = tokenized(None, tokenizer, rounds * (PREFIX + WARM_UP + tokens))
        windows = text.split(PREFIX + WARM_UP + tokens)
        seconds = {way: [] for way in WAYS}
        order, shuffle = list(WAYS), random.Random(0).shuffle
        with progress("decoding", rounds * len(WAYS)) as advance:
            for window in windows:
                shuffle(order)
                for way in order:
                    seconds[way].append(decode_seconds(models[way][0], window))
                    advance()
        checkpoint = Checkpoint(folder)
        store = stack.enter_context(open_packed(checkpoint, checkpoint.layout(), progress))
        page, pages = store.page(0, 0).numpy(), cycle(range(store.pages))
        return {
            "command": "verify_cost",
            "machine": describe(),
            "model": folder.resolve().name,
            "pool": pool,
            "rounds": rounds,
            "tokens": tokens,
            "page_bytes": store.page_bytes,
            "checksum_ms": _median_ms(lambda: checksum(page)),
            "read_ms": _median_ms(lambda: store.page(*divmod(next(pages), store.layout.experts))),
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


def _median_ms(run: Callable[[], object], times: int = 50) -> float:
    each = []
    for _ in range(times):
        start = perf_counter()
        run()
        each.append(perf_counter() - start)
    return statistics.median(each) * 1e3


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
