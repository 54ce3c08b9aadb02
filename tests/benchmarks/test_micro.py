"""The microbenchmarks' arithmetic: bounds, repetitions, and what the report makes of them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from cachemoe.benchmarks import micro_bench_route
from cachemoe.benchmarks.conftest import pytest_collection_modifyitems
from cachemoe.benchmarks.geometries import GEOMETRIES
from cachemoe.benchmarks.micro_figures import (
    IN_TURN,
    MATMUL,
    MEMORY,
    PINNED,
    Measurement,
    Subject,
    Work,
    aggregate,
    bound,
)
from cachemoe.benchmarks.micro_model import expected_seconds
from cachemoe.benchmarks.micro_plot import drawable, plot_micro
from cachemoe.benchmarks.micro_report import micro_notes, micro_tables

ROOT = Path(__file__).resolve().parents[2]
SPEEDS = {MEMORY: 100e9, PINNED: 10e9, MATMUL: 1e12}
SUBJECT = Subject("experts", "olmoe", 1, "bf16", "cachemoe")
MEASUREMENT = Measurement(SUBJECT, Work(bytes=10**8), 0, 2e-3, 50, 1, "call by call")


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (Work(bytes=10**9), (0.01, MEMORY)),
        (Work(bytes=10**9, link=PINNED), (0.1, PINNED)),
        (Work(bytes=10**9, flops=10**9), (0.01, MEMORY)),
        (Work(bytes=10**9, flops=10**12), (1.0, MATMUL)),
        (Work(bytes=10**9, missed=10**8), (0.02, IN_TURN)),
        (Work(), None),
    ],
)
def test_the_bound_is_the_slower_of_bytes_and_operations(work, expected):
    assert bound(work, SPEEDS) == expected


def test_repetitions_come_to_their_median_and_spread():
    seconds = [4e-3, 1e-3, 2e-3]
    (row,) = aggregate([replace(MEASUREMENT, repetition=i, seconds=s) for i, s in enumerate(seconds)], SPEEDS)
    assert row["seconds"] == {"median": 2e-3, "min": 1e-3, "max": 4e-3}
    assert row["repetitions"] == 3
    assert row["bound_seconds"] == pytest.approx(1e-3)
    assert row["percent_of_bound"] == pytest.approx(50)
    assert row["bytes_per_second"] == pytest.approx(50e9)


def test_subjects_keep_the_order_of_their_first_measurement():
    other = replace(MEASUREMENT, subject=replace(SUBJECT, implementation="eager loop"))
    rows = aggregate([MEASUREMENT, other, MEASUREMENT, other], SPEEDS)
    assert [(row["implementation"], row["repetitions"]) for row in rows] == [("cachemoe", 2), ("eager loop", 2)]


def test_the_model_is_of_one_tokens_experts_on_its_gpu():
    others = [
        replace(SUBJECT, tokens=512),
        replace(SUBJECT, implementation="eager loop"),
        replace(SUBJECT, kernel="tiles"),
    ]
    measurements = [replace(MEASUREMENT, subject=subject) for subject in (SUBJECT, *others)]
    rows = aggregate(measurements, SPEEDS, "NVIDIA H100 80GB HBM3")
    assert [row["model_seconds"] for row in rows] == [expected_seconds(GEOMETRIES["olmoe"], "bf16", 100e9), *[None] * 3]
    assert "cachemoe by model" in micro_tables({"rows": rows})[0].title
    assert [row["model_seconds"] for row in aggregate(measurements, SPEEDS, "another")] == [None] * 4


def test_without_a_bound_there_is_no_percentage():
    (row,) = aggregate([replace(MEASUREMENT, work=Work())], SPEEDS)
    assert row["bound_seconds"] is row["bound_by"] is row["percent_of_bound"] is None


@pytest.fixture
def report():
    other = replace(MEASUREMENT, subject=replace(SUBJECT, implementation="eager loop"), seconds=8e-3, timing="queued")
    routed = replace(MEASUREMENT, subject=replace(SUBJECT, kernel="route", variant="original"), work=Work())
    return {
        "machine": {"gpu": None, "processor": "a processor", "torch_threads": 2},
        "speeds": {MEMORY: 100e9, MATMUL: 1e12},
        "notes": ["Not installed, and so not measured: vLLM."],
        "rows": aggregate([MEASUREMENT, other, routed], SPEEDS),
    }


def test_the_report_shows_times_beside_their_bound(report):
    console = Console(width=80, record=True)
    for table in micro_tables(report):
        console.print(table)
    text = console.export_text()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "experts, OLMoE-1B-7B, T = 1, bf16" in lines
    assert "100.0 MB, bound 1000 us (memory)" in lines
    assert "cachemoe 2000 2000 2000 50.0 50" in lines
    assert "eager loop* 8000 8000 8000 12.5 12" in lines
    assert "cachemoe 2000 2000 2000" in lines  # route has no bound
    notes = " ".join(micro_notes(report))
    assert "a processor" in notes
    assert "vLLM" in notes
    assert "*: waits for the GPU" in notes


def test_of_hits_and_misses_the_bound_is_said_to_be_a_sum(report):
    missing = replace(MEASUREMENT, subject=replace(SUBJECT, kernel="step"), work=Work(bytes=9 * 10**7, missed=10**7))
    rows = aggregate([missing], report["speeds"] | {PINNED: 10e9})
    assert rows[0]["bytes"] == 10**8 and rows[0]["percent_of_bound"] == pytest.approx(95)
    assert "100.0 MB, bound 1900 us (memory + link)" in micro_tables({"rows": rows})[0].title
    assert "the sum of both times" in " ".join(micro_notes(report | {"rows": rows}))


def test_trials_of_tiles_are_not_drawn(report, tmp_path):
    tried = replace(MEASUREMENT, subject=replace(SUBJECT, kernel="tiles", implementation="8 x 256"))
    tables = [*aggregate([tried], SPEEDS), *report["rows"]]
    assert drawable(report | {"rows": tables}) == drawable(report) and len(drawable(report)) == 2
    with pytest.raises(ValueError, match="trials of tiles"):
        plot_micro(report | {"rows": tables[:1]}, tmp_path / "micro.png")


def test_the_picture_is_drawn(report, tmp_path):
    plot_micro(report, tmp_path / "micro.png")
    assert (tmp_path / "micro.png").read_bytes().startswith(b"\x89PNG")


def test_the_geometries_are_the_published_ones():
    sizes = {name: (g.hidden, g.intermediate, g.experts, g.top_k) for name, g in GEOMETRIES.items()}
    assert sizes == {
        "qwen3-30b-a3b": (2048, 768, 128, 8),
        "olmoe": (2048, 1024, 64, 8),
        "qwen1.5-moe": (2048, 1408, 60, 4),
        "deepseek-v2-lite": (2048, 1408, 64, 6),
        "gpt-oss-20b": (2880, 2880, 32, 4),
        "mixtral-8x7b": (4096, 14336, 8, 2),
    }


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """``pytest benchmarks`` on one small part; what it printed, and the folder it wrote to."""
    folder = tmp_path_factory.mktemp("bench")
    selected = ("micro_bench_decode.py", "micro_bench_route.py", "-k", "engine or original")
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--benchmark-only", f"--bench-out={folder / 'micro.json'}", *selected],
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},  # a session alone
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout, folder


def test_what_torch_compiles_is_timed_last():
    items = [SimpleNamespace(name=f"test_route[{run.id}]") for run in micro_bench_route.runs()]
    ours = [item for item in items if not item.name.endswith("compiled]")]
    pytest_collection_modifyitems(items)
    assert items[: len(ours)] == ours and len(ours) < len(items)


def test_a_session_writes_its_figures_and_its_picture(session):
    output, folder = session
    report = json.loads((folder / "micro.json").read_text(), parse_constant=pytest.fail)
    rows = {(row["kernel"], row["implementation"]): row for row in report["rows"]}
    assert list(rows) == [
        ("engine", "matmuls alone"),
        ("engine", "cachemoe"),
        ("engine", "cachemoe, everything on"),
        ("route", "cachemoe"),
    ]
    assert all(row["repetitions"] == 3 for row in rows.values())
    assert all(0 < r["seconds"]["min"] <= r["seconds"]["median"] <= r["seconds"]["max"] for r in rows.values())
    assert set(report["speeds"]) >= {MEMORY, MATMUL}
    assert report["machine"]["date"]
    assert "Qwen1.5-MoE-A2.7B" in output
    assert sorted(path.name for path in folder.iterdir()) == ["micro.json", "micro.png"]
