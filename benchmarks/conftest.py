"""What the microbenchmarks share: the machine's speeds, the clock, and the report at the end of the session.

pytest-benchmark times the rounds. Its own table is silent: it would show rounds, not calls, and each repetition apart.
"""

import io
import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from time import perf_counter

import pytest
import torch
from rich.console import Console

from cachemoe.benchmarks.micro_figures import MATMUL, MEMORY, PINNED, Measurement, Subject, Work, aggregate
from cachemoe.benchmarks.micro_plot import drawable, plot_micro
from cachemoe.benchmarks.micro_report import micro_notes, micro_tables
from cachemoe.benchmarks.speeds import device_copy_bandwidth, matmul_rate, memory_bandwidth, pinned_copy_bandwidth
from cachemoe.benchmarks.timing import Round
from cachemoe.moe.machine import describe
from cachemoe.offload.files import whole_file

TEST_S = 0.15  # of rounds in one repetition
LEAST_ROUNDS, MOST_ROUNDS = 3, 300
WIDTH = 80  # columns that the tables need


@dataclass
class Session:
    """What the session has measured so far."""

    path: Path
    speeds: dict[str, float] = field(default_factory=dict)
    memory: list[float] = field(default_factory=list)  # a CPU's, in the course of the session
    measurements: list[Measurement] = field(default_factory=list)
    machine: dict = field(default_factory=dict)  # asked once: on a GPU it takes a while
    notes: list[str] = field(default_factory=list)

    def note(self, said: str) -> None:
        """Add to the report what is not there yet: modules come twice, see ``pytest_collection_modifyitems``."""
        if said not in self.notes:
            self.notes.append(said)

    def report(self) -> dict:
        spread = {"memory_samples": self.memory} if self.memory else {}
        gpu = self.machine["gpu"]["name"] if self.machine.get("gpu") else ""
        return {
            "command": "bench",
            "machine": self.machine,
            "speeds": self.speeds | spread,
            "notes": self.notes,
            "rows": aggregate(self.measurements, self.speeds, gpu),
        }

    def write(self) -> None:
        with whole_file(self.path) as partial:
            partial.write_text(json.dumps(self.report(), indent=1, allow_nan=False))


SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser):
    parser.addoption(
        "--bench-out",
        type=Path,
        default=Path(".benchmarks/micro.json"),
        metavar="FILE",
        help="where the microbenchmarks' figures go; the picture goes beside it",
    )


def pytest_configure(config):
    config.option.benchmark_quiet = True
    config.stash[SESSION] = Session(config.getoption("--bench-out"))


def pytest_collection_modifyitems(items):
    """What ``torch.compile`` makes of others' ways comes last: where time is cut short it is needed least."""
    items.sort(key=lambda item: item.name.rstrip("]").endswith("compiled"))


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def session(pytestconfig, device):
    """The session, once the machine's speeds are known."""
    session = pytestconfig.stash[SESSION]
    session.machine = describe()
    if device.type == "cuda":
        session.speeds[MEMORY] = device_copy_bandwidth()
        session.speeds[PINNED] = pinned_copy_bandwidth()
    else:
        sample_memory(session)
    session.speeds[MATMUL] = matmul_rate(device)
    return session


def sample_memory(session: Session) -> None:
    """Measure a CPU's memory once more: shared machines are faster at times, and the bound is of the whole session."""
    session.memory.append(memory_bandwidth())
    session.speeds[MEMORY] = statistics.median(session.memory)


@pytest.fixture(scope="module")
def one_at_a_time(device):
    """The function (key, make) -> what ``make`` made for the key; what was made for the key before is let go first.

    Not a parametrised fixture: pytest would make it anew for every repetition.
    """
    held = {}

    def let_go():
        held.clear()
        torch.compiler.reset()  # compiled code holds memory, and torch compiles one function for a few shapes only
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def get(key, make: Callable[[], object]):
        if key not in held:
            let_go()
            held[key] = make()
        return held[key]

    yield get
    let_go()


@pytest.fixture
def measure(benchmark, session, device):
    """The function that times rounds and notes what they came to."""

    def run(subject: Subject, work: Work, repetition: int, timed: Round) -> None:
        if device.type == "cpu" and work.bytes and subject.implementation == "cachemoe":
            sample_memory(session)
        start = perf_counter()
        timed.run()
        rounds = min(max(ceil(TEST_S / (perf_counter() - start)), LEAST_ROUNDS), MOST_ROUNDS)
        benchmark.group = f"{subject.kernel} {subject.geometry} T{subject.tokens} {subject.variant}"
        benchmark.extra_info.update(implementation=subject.implementation, calls=timed.calls, bytes=work.bytes)
        benchmark.pedantic(timed.run, rounds=rounds, warmup_rounds=1)
        if benchmark.stats is None:  # --benchmark-disable
            return
        seconds = statistics.median(benchmark.stats.stats.data) / timed.calls
        session.measurements.append(Measurement(subject, work, repetition, seconds, rounds, timed.calls, timed.timing))
        session.write()  # each time: an interruption leaves what was measured

    return run


def pytest_terminal_summary(terminalreporter, config):
    session = config.stash[SESSION]
    if not session.measurements:
        return
    report = session.report()
    width = max(shutil.get_terminal_size().columns, WIDTH)
    console = Console(file=io.StringIO(), force_terminal=terminalreporter.hasmarkup, width=width)
    for table in micro_tables(report):
        console.print(table)
    for note in micro_notes(report):
        console.print(note, highlight=False)
    written = f"Every figure: {session.path}."
    if drawable(report):
        picture = session.path.with_suffix(".png")
        with whole_file(picture) as partial:
            plot_micro(report, partial)
        written += f" Picture, of what has a bound, without the trials of tiles: {picture}."
    console.print(written, highlight=False)
    if config.option.verbose > -2:  # with -qq they are only written, and whoever ran this shows them
        terminalreporter.write(console.file.getvalue())
