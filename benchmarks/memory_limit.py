"""A model larger than the memory it is given: it runs through ``load``, and not without.

    cachemoe memory-limit FOLDER --pool 25%

Both run in processes of their own whose address space the system limits (RLIMIT_AS) to 90 % of the model's weights:
everything counts, the interpreter, libraries and thread stacks included.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.info import needs
from cachemoe.moe.sizes import size_text, slots_of
from cachemoe.offload.errors import InputError

LIMIT = 0.9  # of the model's weights
TOKENS = 16


def run_limited(folder: Path, pool: str) -> dict:
    """Generate through ``load``, and load without it, each under the limit.

    Returns:
        ``limit_bytes``, ``weights_bytes``, ``budget_bytes`` (pool and all but the experts), and of each process what
        it reported: ``loaded`` through cachemoe, with ``peak_bytes`` beyond what the imports took; ``unmodified``, with
        the ``error`` that it ended with, None if it did not.

    Raises:
        InputError: for a checkpoint or pool that cannot be.
    """
    checkpoint = Checkpoint(folder)
    needed, shape = needs(checkpoint), checkpoint.shape
    page = needed.formats[0].page
    weights = needed.dense + needed.formats[0].experts
    limit = int(LIMIT * weights)
    budget = needed.dense + sum(slots_of(pool, shape, page)) * page
    return {
        "limit_bytes": limit,
        "weights_bytes": weights,
        "budget_bytes": budget,
        "loaded": _child("load", folder, pool, limit),
        "unmodified": _child("unmodified", folder, pool, limit),
    }


def _child(what: str, folder: Path, pool: str, limit: int) -> dict:
    command = [sys.executable, "-m", "cachemoe.benchmarks.memory_limit", what, str(folder), pool, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "")
        return {"error": f"exit {done.returncode}: {last}"}
    return json.loads(lines[-1])


def _status(field: str) -> int:
    """Bytes of a field of this process's status."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _limited(what: str, folder: Path, pool: str, limit: int) -> dict:
    """In the child: limit the memory, load, and generate."""
    from cachemoe.moe.load import load
    from cachemoe.moe.models import load_model

    mapped, before = _status("VmSize"), _status("VmRSS")
    if mapped >= limit:  # a CUDA build of PyTorch maps gigabytes of libraries
        return {"error": f"the libraries alone take {size_text(mapped)} of address space: try a larger model"}
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    prompt = torch.arange(32, 64)[None]
    try:
        if what == "load":
            model, _ = load(folder, pool=pool, device="cpu")
        else:
            model = load_model(folder, torch.bfloat16)
        tokens = model.generate(prompt, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    except (MemoryError, RuntimeError, InputError) as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    report = {"error": None, "tokens": tokens[0].tolist(), "peak_bytes": _status("VmHWM") - before}
    if what == "load":
        report["misses"] = model.cachemoe.counters.misses
        model.cachemoe.close()
    return report


if __name__ == "__main__":  # the process that ``_child`` starts
    what, folder, pool, limit = sys.argv[1:]
    print(json.dumps(_limited(what, Path(folder), pool, int(limit))))
