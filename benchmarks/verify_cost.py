"""What it costs to hold every page against its checksum: decode at half of the experts, with and without, side by side.

    cachemoe verify-cost FOLDER

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

from cachemoe.benchmarks.ratios import ratio_rows
from cachemoe.benchmarks.swap_overhead import PREFIX, WARM_UP, decode_seconds
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.load import load
from cachemoe.moe.machine import describe
from cachemoe.moe.pack import open_packed
from cachemoe.moe.progress import Progress
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
            "rows": ratio_rows(seconds, BASELINE),
        }


def _median_ms(run: Callable[[], object], times: int = 50) -> float:
    each = []
    for _ in range(times):
        start = perf_counter()
        run()
        each.append(perf_counter() - start)
    return statistics.median(each) * 1e3
