"""Decode from disk in the same memory three ways: cachemoe, mmap and the page cache, accelerate's disk offload.

    cachemoe compare-offload FOLDER --pool 50%

Each is a process of its own in a control group whose memory the system limits, page cache included: that takes root on
Linux, or a group that may be written. They decode the same prose in turns. accelerate is compared where it is
installed.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import torch

from cachemoe.benchmarks.ratios import ratios
from cachemoe.kernels import experts_cpu
from cachemoe.kernels.state import Residency
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.info import needs
from cachemoe.moe.load import load
from cachemoe.moe.machine import describe
from cachemoe.moe.models import load_without_experts
from cachemoe.moe.pack import open_packed
from cachemoe.moe.pooled import PooledExperts
from cachemoe.moe.progress import Progress, show_progress
from cachemoe.moe.sizes import slots_of
from cachemoe.moe.strategies import Original
from cachemoe.moe.text import load_tokens
from cachemoe.offload.counters import Counters
from cachemoe.offload.errors import InputError
from cachemoe.offload.residency import least_recently_used
from cachemoe.offload.store import ExpertStore

CACHEMOE, MAPPED, ACCELERATE = "cachemoe", "mmap", "accelerate"
BESIDE = (
    700e6  # bytes of the limit for the interpreter, libraries, activations: what no way of the three can do without
)
PREFIX = 8
GROUPS = Path("/sys/fs/cgroup")


class MappedExperts:
    """A store's pages mapped into memory, all of them: which are there is the system's to decide.

    An engine for ``PooledExperts``; see ``ResidentEngine``.
    """

    def __init__(self, store: ExpertStore):
        layout = store.layout
        self.page_format, self.counters = layout.page_format, Counters()
        self.state = Residency.empty(torch.full((layout.layers,), layout.experts), layout.experts)
        shape, start = (store.pages, store.page_bytes), store.offset(0, 0)
        mapped = np.memmap(store.path, np.uint8, "c", start, shape)  # copy on write: torch wants it writable
        self._weights = self.page_format.views(torch.from_numpy(mapped))
        self._experts = layout.experts

    @torch.no_grad()
    def forward(self, layer, x, routing, gate_input=None):
        y = torch.empty_like(x)
        frames = routing.ids[0] + layer * self._experts
        experts_cpu.experts(x, frames, routing.weights[0], self._weights, self.page_format, y)
        return y


def compare(folder: Path, pool: str, rounds: int, tokens: int, progress: Progress) -> dict:
    """Milliseconds a token of each way, and how many times as long as cachemoe it takes, round by round.

    Raises:
        InputError: for a checkpoint or pool that cannot be, or where memory cannot be limited.
    """
    checkpoint = Checkpoint(folder)
    layout = checkpoint.layout()
    load_tokens(None, checkpoint.shape.vocabulary, 1)  # refuses what is not byte-level before anything is packed
    with open_packed(checkpoint, layout, progress) as store:
        files = [store.path, *folder.glob("*.safetensors")]
    page, dense = layout.page_format.page_bytes, needs(checkpoint).dense
    limit = int(dense + sum(slots_of(pool, checkpoint.shape, page)) * page + BESIDE)
    ways = [CACHEMOE, MAPPED, *([ACCELERATE] if find_spec("accelerate") else [])]
    rows = {way: [] for way in ways}
    with progress("decoding", rounds * len(ways)) as advance:
        for _ in range(rounds):
            for way in ways:
                for file in files:
                    _forget(file)
                rows[way].append(_child(way, folder, pool, tokens, limit))
                advance()
    agreement = {
        way: statistics.mean(a == b for a, b in zip(runs[0]["answers"], rows[CACHEMOE][0]["answers"], strict=True))
        for way, runs in rows.items()
    }
    report = []
    for way, runs in rows.items():
        times, baseline = ([run["seconds"] for run in each] for each in (runs, rows[CACHEMOE]))
        report.append(
            {
                "name": way,
                "ms_per_token": statistics.median(times) * 1e3,
                "of_cachemoe": ratios(times, baseline),
                "same_next_token": agreement[way],
                "runs": runs,
            }
        )
    return {
        "command": "compare_offload",
        "accelerate": version("accelerate") if ACCELERATE in rows else None,
        "machine": describe(),
        "model": folder.resolve().name,
        "pool": pool,
        "limit_bytes": limit,
        "weights_bytes": dense + checkpoint.shape.experts * len(checkpoint.shape.layers) * page,
        "page_bytes": page,
        "rounds": rounds,
        "tokens": tokens,
        "rows": report,
    }


def _forget(file: Path) -> None:
    """Let go of a file's pages in the cache: a group pays only for those that it brings in itself."""
    with open(file, "rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _limited_group(limit: int) -> Iterator[Path]:
    """A control group with that much memory; its ``cgroup.procs`` takes processes in.

    Raises:
        InputError: if the system does not let one be made.
    """
    first = GROUPS / "memory" if (GROUPS / "memory").is_dir() else GROUPS
    name = "memory.limit_in_bytes" if first != GROUPS else "memory.max"
    group = first / f"cachemoe-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(str(limit))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        raise InputError(
            f"memory cannot be limited here ({error}): run as root on Linux with control groups"
        ) from error
    try:
        yield group
    finally:
        group.rmdir()


def _child(way: str, folder: Path, pool: str, tokens: int, limit: int) -> dict:
    command = [sys.executable, "-m", "cachemoe.benchmarks.compare_offload"]
    with _limited_group(limit) as group:
        done = subprocess.run(
            [*command, way, str(folder), pool, str(tokens), str(limit)],
            capture_output=True,
            text=True,
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
        )
    if done.returncode:
        raise InputError(f"{way} ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


@torch.inference_mode()
def _decode(way: str, folder: Path, pool: str, tokens: int, limit: int) -> dict:
    """In the child: load in one of the ways, decode, and report."""
    with TemporaryDirectory() as offloaded:
        if way == CACHEMOE:
            model, _ = load(folder, pool=pool, device="cpu")
        elif way == MAPPED:
            checkpoint = Checkpoint(folder)
            layout = checkpoint.layout()
            model = load_without_experts(checkpoint)
            engine = MappedExperts(open_packed(checkpoint, layout, show_progress))
            PooledExperts(model, checkpoint, layout, engine, Original(), least_recently_used)
        else:
            from transformers import AutoModelForCausalLM

            budget = {"cpu": int(limit - BESIDE)}
            options = {"device_map": "auto", "max_memory": budget, "offload_folder": offloaded}
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True, **options)
        text = load_tokens(None, model.config.vocab_size, PREFIX + 2 * tokens)
        past = model(text[None, :PREFIX], use_cache=True).past_key_values
        times, answers = [], []
        for place, token in enumerate(text[PREFIX:]):
            if place == tokens and way == CACHEMOE:
                model.cachemoe.reset_counters()
            start = perf_counter()
            logits = model(token[None, None], past_key_values=past, use_cache=True).logits
            times.append(perf_counter() - start)
            answers.append(int(logits.argmax()))
        report = {"seconds": statistics.mean(times[tokens:]), "times": times, "answers": answers}
        if way == CACHEMOE:
            counters = model.cachemoe.counters
            report |= {"miss_rate": counters.misses / counters.selections, "bytes_read": counters.bytes_read}
            model.cachemoe.close()
        return report


if __name__ == "__main__":  # the process that ``_child`` starts
    way, folder, pool, *numbers = sys.argv[1:]
    print(json.dumps(_decode(way, Path(folder), pool, *map(int, numbers))))
