"""Time from a prompt to the logits of the first token: everything in memory, and from pools that begin in two ways.

Each way is a process of its own, and they take turns. A process reads the shortest prompt once off the clock, so that
memory and threads are there, and then every prompt on the clock, each from the residency that the way begins with. No
memory is limited: pages are read past the page cache.
"""

import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch

from cachemoe.benchmarks.compare import CACHEMOE, LLAMA, Way, ways_of
from cachemoe.benchmarks.first_token_start import PROSE, save_residency_after, saved_and_rest, start_over
from cachemoe.benchmarks.gguf_model import gguf_of
from cachemoe.benchmarks.llama_cpp import LlamaCpp
from cachemoe.benchmarks.ratios import ratios
from cachemoe.benchmarks.speeds import store_bandwidths
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.load import load
from cachemoe.moe.pack import open_packed
from cachemoe.moe.progress import Progress
from cachemoe.moe.sizes import slots_of
from cachemoe.offload.errors import InputError


def first_token_times(
    folder: Path,
    pool: str,
    format: str | None,
    dense: str | None,
    prompts: Sequence[int],
    rounds: int,
    progress: Progress,
) -> dict:
    """Milliseconds from a prompt to the first token's logits, and bytes read for it, of each way and prompt.

    Args:
        folder: a byte-level checkpoint.
        pool, format, dense: as ``load`` takes them.
        prompts: their lengths in tokens.

    Raises:
        InputError: for a checkpoint or options that cannot be, or a pool that has room for all, which is never cold.
    """
    checkpoint, prompts = Checkpoint(folder), list(dict.fromkeys(prompts))
    layout, shape = checkpoint.layout(format), checkpoint.shape
    saved, _ = saved_and_rest(PROSE, shape.vocabulary, max(prompts))
    if shape.context is not None and (read := max(len(saved), *prompts)) > shape.context:
        raise InputError(f"this run reads {read} tokens in a row, more than the {shape.context} that the model takes")
    if min(slots_of(pool, shape, layout.page_format.page_bytes)) == shape.experts:
        raise InputError(f"a pool of {pool} has room for every expert, and is never cold: choose a smaller one")
    ours = {"format": format, "dense": dense}
    with TemporaryDirectory() as directory:
        residency = Path(directory) / "residency.safetensors"
        save_residency_after(folder, saved, residency, progress, pool=pool, **ours)
        gc.collect()  # a model refers to itself, and its pool is not to stay in memory beside the ways
        ways = [
            Way("everything resident", CACHEMOE, ours | {"pool": "100%"}, False),
            Way(f"pool {pool}, cold", CACHEMOE, ours | {"pool": pool}, False),
            Way(f"pool {pool}, saved residency", CACHEMOE, ours | {"pool": pool, "residency": str(residency)}, False),
        ]
        others = ways_of(pool, format, dense, "original")
        ways += [way for way in others if way.program == LLAMA and not way.limited]
        gguf = gguf_of(checkpoint, progress) if any(way.program == LLAMA for way in ways) else None
        runs: list[list[list[dict]]] = [[] for _ in ways]
        disk = []
        with (
            open_packed(checkpoint, layout, progress) as store,
            progress("prompts to first tokens", rounds * len(ways)) as advance,
        ):
            for _ in range(rounds):
                disk += store_bandwidths(store)["bare"]
                for way, done in zip(ways, runs, strict=True):
                    told = {"program": way.program, "options": way.options, "prompts": prompts}
                    done.append(_child(way.name, told | {"folder": str(folder), "gguf": gguf and str(gguf)}))
                    advance()
    page, speed = layout.page_format.page_bytes, statistics.median(disk)
    return {
        "model": folder.resolve().name,
        "pool": pool,
        "format": layout.page_format.kind,
        "dense": dense,
        "page_bytes": page,
        "saved_tokens": len(saved),
        "rounds": rounds,
        "disk_bytes_per_second": {"median": speed, "min": min(disk), "max": max(disk)},
        "rows": [
            _row(ways[i], length, [run[at] for run in runs[i]], [run[at] for run in runs[0]], page, speed)
            for at, length in enumerate(prompts)
            for i in range(len(ways))
        ],
    }


def _row(way: Way, length: int, runs: list[dict], resident: list[dict], page: int, disk: float) -> dict:
    """A way's figures at one prompt; the bound is that of the pages of the experts that were not there and it used."""
    seconds = [run["seconds"] for run in runs]
    options = {name: value for name, value in way.options.items() if name != "residency"}
    row = asdict(way) | {"options": options, "prompt_tokens": length, "runs": runs}
    row |= {
        "ms": {"median": statistics.median(seconds) * 1e3, "min": min(seconds) * 1e3, "max": max(seconds) * 1e3},
        "of_resident": ratios(seconds, [run["seconds"] for run in resident]),
    }
    if way.program == CACHEMOE:
        read, missed = (statistics.median(run[name] for run in runs) for name in ("bytes_read", "misses"))
        row |= {"bytes_read": read, "missed_bytes": missed * page, "bound_ms": missed * page / disk * 1e3}
        row["same_token"] = all(a["token"] == b["token"] for a, b in zip(runs, resident, strict=True))
    return row


def _child(name: str, told: dict) -> list[dict]:
    """What ``_read_prompts`` gives, in a process of its own."""
    command = [sys.executable, "-m", "cachemoe.benchmarks.first_token_times", json.dumps(told)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1]
        raise InputError(f"{name} ended with {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _read_prompts(told: dict) -> list[dict]:
    """Load in one of the ways, and read every prompt on the clock: ``seconds`` and ``token`` of each.

    Of cachemoe also ``bytes_read``, and ``misses``: the distinct experts of the prompt that the pool had not.
    """
    prompts = told["prompts"]
    _, text = saved_and_rest(PROSE, Checkpoint(told["folder"]).shape.vocabulary, max(prompts))
    if told["program"] == LLAMA:
        with LlamaCpp(Path(told["gguf"]), context=max(prompts) + 1, **told["options"]) as llama:
            llama.next_token(text[: min(prompts)].tolist())
            answers = [llama.next_token(text[:length].tolist(), anew=True) for length in prompts]
        return [{"seconds": seconds, "token": token} for token, seconds in answers]
    model, _ = load(told["folder"], device="cpu", **told["options"])
    state = model.cachemoe.engine.state.clone()
    runs = []
    with closing(model.cachemoe):
        _first_token(model, text[: min(prompts)])
        for length in prompts:
            start_over(model, state)
            token, seconds = _first_token(model, text[:length])
            counters = model.cachemoe.counters
            read = {"bytes_read": counters.bytes_read, "misses": counters.misses}
            runs.append({"seconds": seconds, "token": token} | read)
    return runs


@torch.inference_mode()
def _first_token(model, prompt: torch.Tensor) -> tuple[int, float]:
    """The token of the highest logit after a prompt ``[P]``, and the seconds from the call to the logits."""
    start = perf_counter()
    logits = model(prompt[None], use_cache=True, logits_to_keep=1).logits
    return int(logits.argmax()), perf_counter() - start


if __name__ == "__main__":  # the process that ``_child`` starts
    print(json.dumps(_read_prompts(json.loads(sys.argv[1]))))
