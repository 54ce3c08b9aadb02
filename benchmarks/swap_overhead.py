"""What the swapped path costs or saves with everything in memory: decode against transformers' own, side by side.

    python -m cachemoe.benchmarks.swap_overhead FOLDER

Each implementation has a model of its own in one process; they decode the same tokens in turns, in a new order each
round.
"""

import gc
import json
import random
import statistics
from pathlib import Path
from time import perf_counter
from typing import Annotated

import torch
import typer
from rich import box
from rich.table import Table

from cachemoe.benchmarks.machine import describe
from cachemoe.benchmarks.terminal import check_destination, console, one_sentence
from cachemoe.moe.checkpoint import TINYMOE, Checkpoint
from cachemoe.moe.load import swap
from cachemoe.moe.models import load_model
from cachemoe.moe.progress import Progress, show_progress
from cachemoe.moe.strategies import CachePrior
from cachemoe.offload.files import whole_file

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
                seconds[name].append(_decode(models[name], text, name if name in OWN else None))
                advance()
    rows = []
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[BASELINE], strict=True)]
        rows.append(
            {
                "name": name,
                "ms_per_token": statistics.median(times) * 1e3,
                "of_eager": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
                "seconds": times,
            }
        )
    return {
        "command": "swap_overhead",
        "machine": describe(),
        "model": folder.resolve().name,
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": rounds,
        "tokens": tokens,
        "rows": rows,
    }


@torch.inference_mode()
def _decode(model, text: torch.Tensor, implementation: str | None) -> float:
    """Median seconds of a token."""
    if implementation is not None:
        model.set_experts_implementation(implementation)
    past = model(text[None, :PREFIX], use_cache=True).past_key_values
    times = []
    for token in text[PREFIX:]:
        start = perf_counter()
        model(token[None, None], past_key_values=past, use_cache=True)
        times.append(perf_counter() - start)
    return statistics.median(times[WARM_UP:])


def main(
    folder: Annotated[Path, typer.Argument(help="A checkpoint that fits into memory five times.")] = TINYMOE,
    rounds: Annotated[int, typer.Option(min=3, help="How often each implementation decodes.")] = 7,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded on the clock each time.")] = 24,
    json_path: Annotated[Path, typer.Option("--json", help="Where every figure goes.")] = Path("results/swap.json"),
) -> None:
    """Decode through the swapped path and through transformers' own, everything resident."""
    with one_sentence():
        check_destination(json_path)
        report = measure(folder, rounds, tokens, show_progress)
        table = Table(title=f"{report['model']}, {report['dtype']}: decode, everything resident", box=box.SIMPLE_HEAD)
        for heading in ("implementation", "ms a token", "of eager (spread)"):
            table.add_column(heading, justify="left" if heading == "implementation" else "right", no_wrap=True)
        for row in report["rows"]:
            ratio = "{median:.2f} ({min:.2f}-{max:.2f})".format(**row["of_eager"])
            table.add_row(row["name"], f"{row['ms_per_token']:.2f}", ratio)
        console.print(table)
        with whole_file(json_path) as partial:
            partial.write_text(json.dumps(report, indent=1))
        console.print(f"[dim]Every figure: {json_path}.[/dim]")


if __name__ == "__main__":
    typer.run(main)
