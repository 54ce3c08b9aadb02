"""What the swapped path costs or saves with everything in memory: decode against transformers' own, side by side.

    cachemoe swap-overhead FOLDER

Each implementation has a model of its own in one process; they decode the same tokens in turns, in a new order each
round.
"""

import gc
import random
import statistics
from pathlib import Path
from time import perf_counter

import torch

from cachemoe.benchmarks.ratios import ratio_rows
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.load import swap
from cachemoe.moe.machine import describe
from cachemoe.moe.models import load_model
from cachemoe.moe.progress import Progress
from cachemoe.moe.strategies import CachePrior

OWN = ("eager", "batched_mm", "grouped_mm")
PREFIX, WARM_UP = 32, 4
BASELINE = "eager"


def measure(folder: Path, rounds: int, tokens: int, progress: Progress) -> dict:
    """Milliseconds a token of each implementation, and how many times as long as eager it takes, round by round."""
    dtype = Checkpoint(folder).dtype
    own = load_model(folder, dtype)
    models = {name: own for name in OWN}
    for name, format, routing in (
        ("cachemoe", None, None),
        ("cachemoe, cache-prior", None, CachePrior(0.2)),
        ("cachemoe, int4", "int4", None),
    ):
        models[name] = load_model(folder, dtype)
        swap(models[name], routing=routing, format=format, progress=progress)
        gc.collect()
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, own.config.vocab_size, (PREFIX + WARM_UP + tokens,), generator=generator)
    seconds = {name: [] for name in models}
    order, shuffle = list(models), random.Random(0).shuffle
    with progress("decoding", rounds * len(models)) as advance:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                if name in OWN:
                    own.set_experts_implementation(name)
                seconds[name].append(decode_seconds(models[name], text))
                advance()
    return {
        "command": "swap_overhead",
        "machine": describe(),
        "model": folder.resolve().name,
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": rounds,
        "tokens": tokens,
        "rows": ratio_rows(seconds, BASELINE),
    }


@torch.inference_mode()
def decode_seconds(model, text: torch.Tensor) -> float:
    """Median seconds of a token, after ``PREFIX`` tokens at once and ``WARM_UP`` that do not count.

    Args:
        text: ``[T]`` int64.
    """
    past = model(text[None, :PREFIX], use_cache=True).past_key_values
    times = []
    for token in text[PREFIX:]:
        start = perf_counter()
        model(token[None, None], past_key_values=past, use_cache=True)
        times.append(perf_counter() - start)
    return statistics.median(times[WARM_UP:])
