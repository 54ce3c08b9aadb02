"""Decode the same text in several ways, everything in memory and in the memory of half of the experts, say.

    cachemoe compare FOLDER --format int4 --dense int4

Each way is a process of its own; the ways of little memory are in a control group whose memory the system limits, page
cache included: that takes root on Linux, or a group that may be written. All decode the same prose, one token at a
time, in turns. llama.cpp and accelerate are compared where they are installed.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import torch

from cachemoe.benchmarks.gguf_model import gguf_of
from cachemoe.benchmarks.llama_cpp import LlamaCpp
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
from cachemoe.moe.strategies import Original, Strategy
from cachemoe.moe.text import load_tokens
from cachemoe.offload.counters import Counters
from cachemoe.offload.errors import InputError
from cachemoe.offload.residency import least_recently_used
from cachemoe.offload.store import ExpertStore

CACHEMOE, MAPPED, ACCELERATE, LLAMA = "cachemoe", "mmap", "accelerate", "llama.cpp"
BESIDE = {  # bytes of a limit for what a program can do without weights in: libraries, activations, keys and values
    CACHEMOE: 700e6,
    MAPPED: 700e6,
    ACCELERATE: 700e6,
    LLAMA: 400e6,
}
PREFIX, PROMPT = 8, 512  # tokens before those on the clock; of the prompt that is timed by itself
GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Way:
    """One way of running the model.

    Args:
        name: as tables call it.
        program: one of the four.
        options: of ``load``; of llama.cpp whether it lays matrices out anew, ``repack``.
        limited: whether its memory is.
    """

    name: str
    program: str
    options: dict
    limited: bool


def ways_of(pool: str, format: str | None, dense: str | None, routing: str) -> list[Way]:
    """The ways that are installed: llama.cpp beside int4, which its Q4_0 is like, accelerate beside whole weights."""
    ours = {"format": format, "dense": dense}
    ways = [
        Way(f"{CACHEMOE}, exact", CACHEMOE, ours | {"pool": "100%"}, False),
        Way(f"{CACHEMOE}, exact", CACHEMOE, ours | {"pool": pool}, True),
        Way(f"{CACHEMOE}, {routing}", CACHEMOE, ours | {"pool": pool, "routing": routing}, True),
    ]
    if dense is None:
        ways.append(Way(f"{MAPPED} of the same store", MAPPED, {"format": format}, True))
    if format is None and dense is None and find_spec("accelerate"):
        ways.append(Way(f"{ACCELERATE}'s disk offload", ACCELERATE, {}, True))
    if format == "int4" and find_spec("xllamacpp") and find_spec("gguf"):
        for limited in (False, True):
            for repack in (True, False):
                ways.append(Way(f"{LLAMA}, {'repacked' if repack else 'plain'}", LLAMA, {"repack": repack}, limited))
    return ways


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


def compare(
    folder: Path,
    pool: str,
    format: str | None,
    dense: str | None,
    routing: str,
    rounds: int,
    tokens: int,
    progress: Progress,
) -> dict:
    """Milliseconds a token of each way, and how many times as long it takes as the first of its kind, round by round.

    Args:
        pool, format, dense: as ``load`` takes them.
        routing: of a way that does not route exactly.
        tokens: on the clock, after as many to warm up.

    Raises:
        InputError: for a checkpoint or options that cannot be, or where memory cannot be limited.
    """
    checkpoint = Checkpoint(folder)
    shape = checkpoint.shape
    Strategy.parse(routing, shape.experts, shape.top_k)
    layout = checkpoint.layout(format)
    load_tokens(None, shape.vocabulary, 1)  # refuses what is not byte-level before anything is packed
    ways = ways_of(pool, format, dense, routing)
    with open_packed(checkpoint, layout, progress) as store:
        files = [store.path, *folder.glob("*.safetensors")]
    gguf = None
    if any(way.program == LLAMA for way in ways):
        gguf = gguf_of(checkpoint, progress)
        files.append(gguf)
    page, whole = layout.page_format.page_bytes, needs(checkpoint).dense
    half = whole + sum(slots_of(pool, shape, page)) * page
    limits = [int(half + BESIDE[way.program]) if way.limited else None for way in ways]
    runs: list[list[dict]] = [[] for _ in ways]
    with progress("decoding", rounds * len(ways)) as advance:
        for _ in range(rounds):
            for way, limit, done in zip(ways, limits, runs, strict=True):
                if way.limited:
                    for file in files:
                        _forget(file)
                if not any("failed" in run for run in done):
                    done.append(_child(way, folder, gguf, tokens, limit))
                advance()
    return {
        "command": "compare",
        "versions": {name: version(name) for name in ("accelerate", "xllamacpp", "gguf") if find_spec(name)},
        "machine": describe(),
        "model": folder.resolve().name,
        "pool": pool,
        "format": layout.page_format.kind,
        "dense": dense,
        "weights_bytes": whole + shape.experts * len(shape.layers) * page,
        "page_bytes": page,
        "rounds": rounds,
        "tokens": tokens,
        "rows": [_row(ways, limits, runs, i) for i in range(len(ways))],
    }


def _row(ways: list[Way], limits: list[int | None], runs: list[list[dict]], i: int) -> dict:
    """A way's figures, held to the first way that is limited as it is, and to the first of all."""
    row = asdict(ways[i]) | {"limit_bytes": limits[i], "runs": runs[i]}
    if "failed" in runs[i][-1]:
        return row | {"failed": runs[i][-1]["failed"]}
    like = next(n for n, way in enumerate(ways) if way.limited == ways[i].limited)
    times, baseline, resident = ([run["seconds"] for run in runs[n]] for n in (i, like, 0))
    same = [a == b for a, b in zip(runs[i][0]["answers"], runs[0][0]["answers"], strict=True) if a is not None]
    return row | {
        "ms_per_token": statistics.median(times) * 1e3,
        "of_first": ratios(times, baseline),
        "of_resident": ratios(times, resident),
        "prompt_tokens_per_second": statistics.median(PROMPT / run["prompt_seconds"] for run in runs[i]),
        "same_next_token": statistics.mean(same) if same else None,
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


def _child(way: Way, folder: Path, gguf: Path | None, tokens: int, limit: int | None) -> dict:
    """What the way's process reports; ``failed`` in words where llama.cpp does not live in its group."""
    command = [sys.executable, "-m", "cachemoe.benchmarks.compare"]
    told = {"program": way.program, "options": way.options, "folder": str(folder), "gguf": gguf and str(gguf)}
    with nullcontext() if limit is None else _limited_group(limit) as group:
        done = subprocess.run(
            [*command, json.dumps(told | {"tokens": tokens, "limit": limit})],
            capture_output=True,
            text=True,
            preexec_fn=None if group is None else lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
        )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    words = f"ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}"
    if way.program == LLAMA and limit is not None:
        return {"failed": "killed" if done.returncode == -9 else words}
    raise InputError(f"{way.name} {words}")


def _decode(told: dict) -> dict:
    """In the child: load in one of the ways, decode, take a prompt, and report."""
    tokens = told["tokens"]
    text = load_tokens(None, Checkpoint(told["folder"]).shape.vocabulary, max(PROMPT, PREFIX + 2 * tokens))
    if told["program"] == LLAMA:
        with LlamaCpp(Path(told["gguf"]), **told["options"]) as llama:
            times, answers = [], []
            llama.next_token(text[:PREFIX].tolist())
            for end in range(PREFIX + 1, PREFIX + 2 * tokens + 1):
                answer, seconds = llama.next_token(text[:end].tolist())
                times.append(seconds)
                answers.append(answer)
            _, prompt_seconds = llama.next_token(text[:PROMPT].tolist(), anew=True)
        report = {}
    else:
        with TemporaryDirectory() as offloaded:
            model = _model(told, offloaded)
            times, answers, prompt_seconds, report = _forward(model, text, tokens)
    return report | {
        "seconds": statistics.median(times[tokens:]),
        "mean_seconds": statistics.mean(times[tokens:]),
        "times": times,
        "answers": answers,
        "prompt_seconds": prompt_seconds,
    }


def _model(told: dict, offloaded: str):
    folder, options = Path(told["folder"]), told["options"]
    if told["program"] == CACHEMOE:
        return load(folder, device="cpu", **options)[0]
    if told["program"] == MAPPED:
        checkpoint = Checkpoint(folder)
        layout = checkpoint.layout(options["format"])
        model = load_without_experts(checkpoint)
        engine = MappedExperts(open_packed(checkpoint, layout, show_progress))
        PooledExperts(model, checkpoint, layout, engine, Original(), least_recently_used)
        return model
    from transformers import AutoModelForCausalLM

    budget = {"cpu": int(told["limit"] - BESIDE[ACCELERATE])}
    options = {"device_map": "auto", "max_memory": budget, "offload_folder": offloaded}
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True, **options)


@torch.inference_mode()
def _forward(model, text: torch.Tensor, tokens: int) -> tuple[list[float], list[int], float, dict]:
    pooled = getattr(model, "cachemoe", None)
    past = model(text[None, :PREFIX], use_cache=True).past_key_values
    times, answers, report = [], [], {}
    for place, token in enumerate(text[PREFIX : PREFIX + 2 * tokens]):
        if place == tokens and pooled is not None:
            pooled.reset_counters()
        start = perf_counter()
        logits = model(token[None, None], past_key_values=past, use_cache=True).logits
        times.append(perf_counter() - start)
        answers.append(int(logits.argmax()))
    if pooled is not None and pooled.counters.selections:
        counters = pooled.counters
        report = {"miss_rate": counters.misses / counters.selections, "bytes_read": counters.bytes_read}
    start = perf_counter()
    model(text[None, :PROMPT], use_cache=True, logits_to_keep=1)
    return times, answers, perf_counter() - start, report


if __name__ == "__main__":  # the process that ``_child`` starts
    print(json.dumps(_decode(json.loads(sys.argv[1]))))
