"""One run of ``cachemoe gpu``: every check and measurement that needs a GPU, a subprocess each, in one JSON file.

A step that fails or hangs does not take the others with it, and what has been measured is on disk after every step.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from xml.etree import ElementTree

import torch

from cachemoe.moe.progress import Progress
from cachemoe.offload.errors import InputError
from cachemoe.offload.files import whole_file

ROOT = Path(__file__).resolve().parents[1]
GRACE_S = 10.0  # after the interrupt at a step's limit, for it to write what it has
# A small part of the table: one capacity, one strategy.
LATENCY = (
    *("--capacity=50%", "--strategy=cache-prior:0.2", "--store=pinned"),
    *("--prefetch=none", "--prefetch=gate:1", "--drive=host"),
)
# By name, options and share. At the machine's own speed, where a graph can drive too, with quality on a quarter of the
# text; and paced by the host as a phone and as a GPU's slot, with the least text: their quality is the first one's.
TABLES = {
    "latency": (("--drive=graph", "--quality-tokens=2048"), 2),
    "latency-phone": (("--profile=phone-ufs4.0", "--quality-tokens=512"), 1),
    "latency-pcie": (("--profile=pcie4", "--quality-tokens=512"), 1),
}
# What is cut at the end of the time is the least needed.
MICRO = tuple(f"benchmarks/micro_bench_{name}.py" for name in ("step", "route", "fetch", "experts", "tiles", "decode"))
SANITIZER = "compute-sanitizer"  # of the CUDA toolkit; its steps are there where it is
SANITIZED = (
    *(f"tests/kernels/test_{name}.py" for name in ("fetch", "experts", "route")),
    "tests/offload/test_device_engine.py",
)
TAIL = 4000  # characters of output kept of a step that failed


@dataclass(frozen=True)
class Step:
    """One subprocess.

    Args:
        name: for the report.
        command: what runs, in the folder of the sources.
        share: of the time that is left, against the shares of the steps after it.
        collect: its result for the report, from what it wrote, whatever became of it; called with its output. A
            ``complaint`` in the result makes the step fail.
    """

    name: str
    command: Sequence[str]
    share: float
    collect: Callable[[str], dict] = field(default=lambda output: {})


def gpu_steps(folder: Path, rehearse: bool) -> list[Step]:
    """The steps, in order; what they write goes into ``folder``."""
    python = sys.executable
    describe = "import json; from cachemoe.moe.machine import describe; print(json.dumps(describe()))"
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    # Most of the tests' time is compiling kernels: where pytest-xdist is installed, on several cores.
    spread = ("-n", str(min(8, len(os.sched_getaffinity(0))))) if find_spec("xdist") and not rehearse else ()
    ours = "gpu or kernel"
    correctness, micro = folder / "correctness.xml", folder / "micro.xml"
    everything = ("--capability=90",) if rehearse else ("--tiles",)  # without a GPU no other tiles are tried
    figures, compiled = folder / "micro.json", folder / "compile.json"

    def tested(output: str) -> dict:
        tests = junit(correctness)
        if not rehearse and not tests["passed"]:
            tests["complaint"] = "no GPU test passed"
        return tests

    # A CPU, paced as a phone, takes a second a token.
    least = ("--tokens=6", "--quality-tokens=512") if rehearse else ()

    def table(name: str, more: Sequence[str], share: float) -> Step:
        figures, picture = folder / f"{name}.json", folder / f"{name}.png"
        where = f"--json={figures}", f"--plot={picture}"
        command = (python, "-m", "cachemoe.benchmarks.cli", "latency", *LATENCY, *more, *least, *where)
        return Step(name, command, share, lambda output: read_json(figures))

    def sanitized(tool: str) -> Step:
        results = folder / f"{tool}.xml"
        # Memory by itself for each tensor, or what lies beyond one would be another's.
        command = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", SANITIZER, "--tool", tool, "--error-exitcode=99")
        tests = (*SANITIZED, "-m", "gpu", f"--junit-xml={results}")
        return Step(tool, (*command, *pytest, *tests), 1, lambda output: junit(results))

    return [
        Step("environment", (python, "-c", describe), 2, lambda output: json.loads(output.strip().splitlines()[-1])),
        # First, on every core: the steps after it find these kernels in Triton's cache.
        Step(
            "compile",
            (python, "-m", "cachemoe.benchmarks.cli", "compile", *everything, f"--json={compiled}"),
            6,
            lambda output: summarised(read_json(compiled)),
        ),
        Step("correctness", (*pytest, *spread, "tests", "-m", ours, f"--junit-xml={correctness}"), 8, tested),
        *(table(name, *how) for name, how in TABLES.items()),
        Step(
            "microbenchmarks",
            (*pytest, "-q", *MICRO, "--benchmark-only", f"--bench-out={figures}", f"--junit-xml={micro}"),
            10,
            lambda output: {"figures": read_json(figures), "tests": junit(micro) if micro.exists() else None},
        ),
        *(sanitized(tool) for tool in ("memcheck", "racecheck") if shutil.which(SANITIZER) and not rehearse),
    ]


def run_gpu(out: Path, seconds: float, only: Sequence[str], rehearse: bool, progress: Progress) -> dict:
    """Run the steps; the report is written to ``out`` after each.

    Args:
        out: a JSON file; the steps' pictures go beside it.
        only: names of the steps to run; none: every step.
        seconds: of all steps together; time that a step leaves goes to those after it.
        rehearse: run on the CPU what would run on a GPU.
        progress: shows the steps.

    Raises:
        InputError: without a GPU, unless it is a rehearsal, without the sources, or for a step that there is not.
    """
    if not (ROOT / "tests").is_dir():
        raise InputError("the tests are not beside the installed package: run this from a checkout, pip install -e .")
    if not rehearse and not torch.cuda.is_available():
        raise InputError(
            "there is no CUDA GPU here. With one, this compiles the kernels, runs the GPU tests, the microbenchmarks "
            "and the latency table, and writes one JSON file; --rehearse runs the same steps on the CPU."
        )
    with TemporaryDirectory() as name:
        folder = Path(name)
        report = {
            "command": "gpu",
            "rehearsal": rehearse,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "budget_s": seconds,
        }
        # A rehearsal runs on the CPU even where there is a GPU.
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if rehearse else {})

        def write():
            with whole_file(out) as partial:
                partial.write_text(json.dumps(report, indent=1))
            for picture in folder.glob("*.png"):
                shutil.copyfile(picture, out.with_name(f"{out.stem}-{picture.name}"))

        steps = gpu_steps(folder, rehearse)
        names = [step.name for step in steps]
        for name in only:
            if name not in names:
                raise InputError(f"there is no step {name!r}; there are {', '.join(names)}")
        chosen = [step for step in steps if step.name in only or not only]
        run_steps(chosen, seconds, environment, report, write, progress)
    return report


def run_steps(
    steps: Sequence[Step],
    seconds: float,
    environment: dict[str, str],
    report: dict,
    write: Callable[[], None],
    progress: Progress,
) -> None:
    """Run the steps one after another into ``report["steps"]``, calling ``write`` before the first and after each."""
    report["steps"] = [{"name": step.name, "status": "not run"} for step in steps]
    write()
    end = monotonic() + seconds
    for place, step in enumerate(steps):
        limit = (end - monotonic()) * step.share / sum(later.share for later in steps[place:])
        entry = report["steps"][place]
        try:
            if limit > 0:
                with progress(f"{step.name}, at most {limit:.0f} s", 1) as advance:
                    run_step(step, limit, environment, entry)
                    advance()
        finally:
            write()


def run_step(step: Step, limit: float, environment: dict[str, str], entry: dict) -> None:
    """Run one step into ``entry``: status ``passed``, ``failed``, ``timed out`` or ``interrupted``.

    At its limit the step's process group is interrupted, so that it can write what it has, and then killed.
    """
    start = monotonic()
    with TemporaryDirectory() as name:
        log = Path(name) / "output"
        with log.open("wb") as sink:
            running = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=environment,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # In the background of a script everything ignores it, and children would too.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            status = None
            try:
                running.wait(limit)
            except subprocess.TimeoutExpired:
                status = "timed out"
            except KeyboardInterrupt:
                status = "interrupted"
                raise
            finally:
                _end(running)
                entry |= {"seconds": monotonic() - start, "limit_s": limit, "exit_code": running.returncode}
                entry["status"] = status or ("failed" if running.returncode else "passed")
        output = log.read_text(errors="replace")
    try:
        entry["result"] = step.collect(output)
    except FileNotFoundError:
        entry["result"] = {"complaint": "it ended before it wrote a result"}
    except Exception as error:  # whatever a step left behind, the next one runs
        entry["result"] = {"complaint": f"no result: {type(error).__name__}: {error}"}
    if "complaint" in entry["result"] and entry["status"] == "passed":
        entry["status"] = "failed"
    if entry["status"] != "passed":
        entry["output_tail"] = output[-TAIL:]


def _end(running: subprocess.Popen) -> None:
    """See that nothing of the step's process group is left."""
    if running.poll() is None:
        os.killpg(running.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            running.wait(GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)  # its children may outlive it
    running.wait()


def commit() -> str | None:
    """The commit of the sources, with ``+`` where they have been changed since; None where git cannot tell."""
    with suppress(OSError, subprocess.CalledProcessError):
        said = subprocess.run(
            ("git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        return said.stdout.strip()
    return None


def summarised(compiled: dict) -> dict:
    """A report of ``cachemoe compile`` without the rows that nothing is wrong with."""
    wrong = [row for row in compiled["rows"] if row["defects"]]
    whole = {name: compiled[name] for name in ("triton", "interrupted")}
    return whole | {"configurations": len(compiled["rows"]), "wrong": wrong}


def junit(path: Path) -> dict:
    """Counts of a JUnit XML file, and its failures with their messages.

    Raises:
        OSError, ElementTree.ParseError: if there is none.
    """
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for case in ElementTree.parse(path).iter("testcase"):
        wrong = [element for element in case if element.tag in ("failure", "error")]
        if wrong:
            counts["failed"] += 1
            name = f"{case.get('classname')}::{case.get('name')}"
            failures += [{"test": name, "message": element.get("message")} for element in wrong]
        else:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
    return counts | {"failures": failures}


def read_json(path: Path) -> dict:
    """A JSON file's content.

    Raises:
        OSError: if there is none.
    """
    return json.loads(path.read_text())
