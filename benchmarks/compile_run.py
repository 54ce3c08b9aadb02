"""The ``cachemoe compile`` command: every kernel configuration compiled for GPUs that need not be there."""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context

import torch
import triton
from rich import box
from rich.table import Table

from cachemoe.benchmarks.compile_ahead import SHARED_MEMORY, compile_launch, defects, read_resources
from cachemoe.benchmarks.compile_cases import cases
from cachemoe.benchmarks.tiles import tile_cases
from cachemoe.kernels.launch import Launch
from cachemoe.moe.progress import Progress
from cachemoe.offload.errors import InputError

MOST_WORKERS = 32  # each is a process with PyTorch
COLUMNS = ("registers", "shared", "stack", "wide_loads", "asynchronous", "tensor_core")


def default_capabilities() -> list[int]:
    """The compute capability of the GPU that is here; without one, those of an A100 and an H100."""
    if not torch.cuda.is_available():
        return [80, 90]
    major, minor = torch.cuda.get_device_capability()
    return [10 * major + minor]


def run_compile(capabilities: Sequence[int], tiles: bool, progress: Progress) -> dict:
    """Compile every case for every compute capability, on all cores.

    Args:
        capabilities: such as 90.
        tiles: compile ``tile_cases`` too.
        progress: shows the compilations.

    Returns:
        For JSON: the Triton release, a row for each distinct compilation with its resources and its defects, and
        whether it was interrupted, so that rows are missing.

    Raises:
        InputError: for a compute capability whose limits are not known here.
    """
    for capability in capabilities:
        if capability not in SHARED_MEMORY:
            known = ", ".join(map(str, SHARED_MEMORY))
            raise InputError(f"compute capability {capability} is not one of those that can be checked: {known}")
    count = len(_all_cases(tiles))
    jobs = [(tiles, index, capability) for capability in capabilities for index in range(count)]
    rows, interrupted = {}, False
    with (
        ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), MOST_WORKERS), get_context("spawn")) as pool,
        progress(f"compiling the kernels' {count} configurations", len(jobs)) as advance,
    ):
        try:
            for key, row in pool.map(_compile, jobs):
                rows.setdefault(key, row)
                advance()
        except KeyboardInterrupt:
            interrupted = True
            pool.shutdown(wait=False, cancel_futures=True)
    return {"triton": triton.__version__, "interrupted": interrupted, "rows": list(rows.values())}


def wrong(report: dict) -> list[dict]:
    """The rows with defects; what is only tried may have them."""
    return [row for row in report["rows"] if row["defects"] and not row["trial"]]


@cache
def _all_cases(tiles: bool) -> list[tuple[str, Launch, bool]]:
    """(what it is for, launch, whether it is a trial)."""
    chosen = [(what, launch, False) for what, launch in cases()]
    return chosen + ([(what, launch, True) for what, launch in tile_cases()] if tiles else [])


def _compile(job: tuple[bool, int, int]) -> tuple[str, dict]:
    """One job in a worker: launches hold kernels, which do not travel between processes, so cases go by number."""
    tiles, index, capability = job
    what, launch, trial = _all_cases(tiles)[index]
    compiled = compile_launch(launch, capability)
    uses = read_resources(compiled)
    row = {
        "kernel": launch.kernel.__name__.strip("_").removesuffix("_kernel"),
        "for": what,
        "trial": trial,
        "capability": capability,
        "constants": {name: str(value) for name, value in launch.constants.items()},
        "warps": launch.num_warps,
        **asdict(uses),
        "defects": defects(launch, uses, capability),
    }
    return compiled.hash, row


def compile_table(report: dict) -> Table:
    """A row for each kernel and capability: how many configurations, and the most or the fewest of each resource."""
    title = f"Compiled ahead of time with Triton {report['triton']}" + (", in part" if report["interrupted"] else "")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    headings = ("kernel", "sm", "count", "regs", "shared", "spilled", "16-byte", "async", "tensor", "wrong")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "kernel" else "right", no_wrap=True)
    groups: dict[tuple[str, int], list[dict]] = {}
    for row in report["rows"]:
        groups.setdefault((row["kernel"], row["capability"]), []).append(row)
    for (kernel, capability), rows in groups.items():
        ranges = []
        for column in COLUMNS:
            low, high = min(row[column] for row in rows), max(row[column] for row in rows)
            ranges.append(str(low) if low == high else f"{low}-{high}")
        table.add_row(kernel, str(capability), str(len(rows)), *ranges, str(len(wrong({"rows": rows}))))
    return table
