"""``cachemoe gpu``: steps that fail, hang or leave nothing, what is on disk after each, and how it refuses."""

import copy
import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from typer.testing import CliRunner

from cachemoe.benchmarks import gpu_run
from cachemoe.benchmarks.cli import app
from cachemoe.benchmarks.gpu_report import gpu_summary, gpu_tables
from cachemoe.benchmarks.gpu_run import Step, gpu_steps, junit, run_steps

JUNIT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.a" name="test_good"/>
<testcase classname="tests.a" name="test_bad"><failure message="assert 1 == 2">long text</failure></testcase>
<testcase classname="tests.a" name="test_broken"><error message="fixture fell over"/></testcase>
<testcase classname="tests.a" name="test_absent"><skipped message="needs a GPU"/></testcase>
</testsuite></testsuites>"""


@contextmanager
def silent(description, total):
    yield lambda: None


def step(name, code, collect=None, share=1):
    command = (sys.executable, "-c", code)
    return Step(name, command, share, collect) if collect else Step(name, command, share)


@pytest.fixture
def run():
    """Runs steps; gives the report and what was written, each time."""

    def run(*steps, seconds=60.0):
        report, written = {"rehearsal": True}, []
        run_steps(steps, seconds, dict(os.environ), report, lambda: written.append(copy.deepcopy(report)), silent)
        return report, written

    return run


def statuses(report):
    return [entry["status"] for entry in report["steps"]]


def test_results_are_merged_and_written_before_the_first_step_and_after_each(run):
    report, written = run(
        step("one", "print(1)", lambda output: {"said": output}),
        step("two", "print(2)", lambda output: {"said": output}),
    )
    assert [statuses(w) for w in written] == [["not run"] * 2, ["passed", "not run"], ["passed", "passed"]]
    assert [entry["result"] for entry in report["steps"]] == [{"said": "1\n"}, {"said": "2\n"}]
    assert written[-1] == report
    json.dumps(report)


def test_a_failing_step_shows_the_end_of_its_output_and_the_next_runs(run):
    report, _ = run(step("bad", "print('x' * 9000); raise SystemExit('the reason')"), step("good", ""))
    assert statuses(report) == ["failed", "passed"]
    assert report["steps"][0]["exit_code"] == 1
    assert report["steps"][0]["output_tail"].strip().endswith("the reason")
    assert len(report["steps"][0]["output_tail"]) <= gpu_run.TAIL
    assert "output_tail" not in report["steps"][1]


def test_a_step_that_hangs_is_interrupted_with_its_children_and_the_next_runs(run, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_run, "GRACE_S", 0.2)
    pids = tmp_path / "pids"
    deaf = "import os, signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    child = "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    code = f"{deaf}{child}open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}'); time.sleep(600)"
    # The step has 3 of 100 parts of the time.
    report, _ = run(step("hangs", code, share=3), step("good", "", share=97), seconds=100.0)
    assert statuses(report) == ["timed out", "passed"]
    assert report["steps"][0]["exit_code"] == -9
    for pid in map(int, pids.read_text().split()):
        assert not _runs(pid)


def _runs(pid):
    """Whether a process runs: neither gone nor a zombie that nobody has waited for."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_step_interrupted_at_its_limit_can_write_what_it_has(run):
    code = "import time\ntry:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    print('half')"
    report, _ = run(
        step("slow", code, lambda output: {"said": output}, share=3), step("rest", "", share=97), seconds=100.0
    )
    assert report["steps"][0]["status"] == "timed out"
    assert report["steps"][0]["result"] == {"said": "half\n"}


def test_ctrl_c_leaves_what_was_measured(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    written = []
    report = {}
    steps = [step("one", ""), step("two", ""), step("three", "")]

    @contextmanager
    def progress(description, total):
        if description.startswith("two"):
            monkeypatch.setattr(gpu_run.subprocess.Popen, "wait", _once(interrupted, gpu_run.subprocess.Popen.wait))
        yield lambda: None

    with pytest.raises(KeyboardInterrupt):
        run_steps(steps, 60.0, dict(os.environ), report, lambda: written.append(copy.deepcopy(report)), progress)
    assert statuses(written[-1]) == ["passed", "interrupted", "not run"]


def _once(first, then):
    calls = []

    def function(*arguments):
        calls.append(arguments)
        return first(*arguments) if len(calls) == 1 else then(*arguments)

    return function


def test_a_step_that_leaves_no_result_failed(run, tmp_path):
    report, _ = run(
        step("nothing", "", lambda output: gpu_run.read_json(tmp_path / "absent.json")),
        step("complains", "", lambda output: {"complaint": "nothing ran"}),
    )
    assert statuses(report) == ["failed", "failed"]
    # The file would have lain in a folder that is gone when the report is read.
    assert report["steps"][0]["result"] == {"complaint": "it ended before it wrote a result"}


def test_without_time_left_a_step_is_not_run(run):
    report, _ = run(step("late", ""), seconds=0.0)
    assert report["steps"] == [{"name": "late", "status": "not run"}]


def test_junit_is_counted_and_its_failures_named(tmp_path):
    (tmp_path / "junit.xml").write_text(JUNIT)
    assert junit(tmp_path / "junit.xml") == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "failures": [
            {"test": "tests.a::test_bad", "message": "assert 1 == 2"},
            {"test": "tests.a::test_broken", "message": "fixture fell over"},
        ],
    }


@pytest.mark.parametrize("rehearse", [True, False])
def test_on_a_gpu_skipping_every_test_is_a_failure(tmp_path, rehearse):
    (tmp_path / "correctness.xml").write_text(
        JUNIT.replace('name="test_good"/>', 'name="test_good"><skipped/></testcase>')
    )
    correctness = next(step for step in gpu_steps(tmp_path, rehearse) if step.name == "correctness")
    assert ("complaint" in correctness.collect("")) is not rehearse


def test_what_is_needed_least_comes_last(tmp_path, monkeypatch):
    names = [step.name for step in gpu_steps(tmp_path, True)]
    tables = ["latency", "latency-phone", "latency-pcie"]
    assert names == ["environment", "compile", "correctness", *tables, "microbenchmarks"]
    (tmp_path / gpu_run.SANITIZER).write_text("#!/bin/sh")
    (tmp_path / gpu_run.SANITIZER).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    names += ["memcheck", "racecheck"]
    assert [step.name for step in gpu_steps(tmp_path, False)] == names
    said = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["gpu", "--help"]).output
    assert all(name in said for name in names)
    for step in gpu_steps(tmp_path, False):
        for argument in step.command:
            if argument.startswith(("tests/", "benchmarks/")):
                assert (gpu_run.ROOT / argument).exists(), argument


def test_more_minutes_are_more_for_every_step(monkeypatch, tmp_path):
    def limits(minutes):
        report, steps = {}, [step(each.name, "", share=each.share) for each in gpu_steps(tmp_path, True)]
        monkeypatch.setattr(gpu_run, "monotonic", lambda: 0.0)  # steps that take no time
        monkeypatch.setattr(gpu_run, "run_step", lambda step, limit, environment, entry: entry.update(limit=limit))
        run_steps(steps, 60.0 * minutes, {}, report, lambda: None, silent)
        return [entry["limit"] for entry in report["steps"]]

    short, long = limits(9), limits(90)
    assert long == pytest.approx([10 * limit for limit in short])
    assert short[-1] == 9 * 60.0  # what the others leave is the last one's


def test_the_report_names_its_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_run, "ROOT", tmp_path)
    assert gpu_run.commit() is None
    for command in ("init -q", "-c user.name=a -c user.email=a@b commit -q --allow-empty -m first"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    first = gpu_run.commit()
    assert len(first) == 40 and int(first, 16)
    (tmp_path / "file").write_text("")
    subprocess.run(["git", "add", "file"], cwd=tmp_path, check=True)
    assert gpu_run.commit() == f"{first}+"


def test_the_microbenchmarks_figures_survive_a_kill_without_junit(tmp_path):
    (tmp_path / "micro.json").write_text('{"rows": []}')
    micro = next(step for step in gpu_steps(tmp_path, True) if step.name == "microbenchmarks")
    assert micro.collect("") == {"figures": {"rows": []}, "tests": None}


def test_the_summary_names_failures_and_says_that_it_is_a_rehearsal(run, tmp_path):
    (tmp_path / "junit.xml").write_text(JUNIT)
    report, _ = run(step("correctness", "raise SystemExit('the end')", lambda output: junit(tmp_path / "junit.xml")))
    said = "\n".join(gpu_summary(report))
    assert all(words in said for words in ("tests.a::test_bad", "assert 1 == 2", "the end"))
    assert "rehearsal" in gpu_tables(report)[-1].title


@pytest.fixture
def quick_steps(monkeypatch):
    """``cachemoe gpu`` with two steps of its own."""

    def steps(folder, rehearse):
        drawn = folder / "micro.png"
        return [
            step("draws", f"open({str(drawn)!r}, 'w').write('picture')"),
            step("hides the GPU", "import os; print(repr(os.environ.get('CUDA_VISIBLE_DEVICES')))", lambda o: {"o": o}),
        ]

    monkeypatch.setattr(gpu_run, "gpu_steps", steps)


def test_a_rehearsal_writes_one_file_and_the_pictures_and_hides_the_gpu(quick_steps, tmp_path):
    out = tmp_path / "folder" / "gpu.json"
    result = CliRunner().invoke(app, ["gpu", "--rehearse", "--out", str(out)])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report["rehearsal"] is True
    assert report["steps"][1]["result"] == {"o": "''\n"}
    assert sorted(path.name for path in out.parent.iterdir()) == ["gpu-micro.png", "gpu.json"]
    assert "rehearsal" in result.output


def test_one_step_alone(quick_steps, tmp_path):
    out = tmp_path / "gpu.json"
    result = CliRunner().invoke(app, ["gpu", "--rehearse", "--step", "draws", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert [step["name"] for step in json.loads(out.read_text())["steps"]] == ["draws"]
    result = CliRunner().invoke(app, ["gpu", "--rehearse", "--step", "drawing", "--out", str(out)])
    assert result.exit_code == 2
    assert "no step 'drawing'; there are draws, hides the GPU" in " ".join(result.stderr.split())


def test_the_compilations_without_defects_are_counted_alone(tmp_path):
    rows = [{"kernel": "route", "defects": []}, {"kernel": "fetch", "defects": ["no 16-byte loads"]}]
    (tmp_path / "compile.json").write_text(json.dumps({"triton": "3.6.0", "interrupted": True, "rows": rows}))
    compiled = next(step for step in gpu_steps(tmp_path, True) if step.name == "compile")
    expected = {"triton": "3.6.0", "interrupted": True, "configurations": 2, "wrong": rows[1:]}
    assert compiled.collect("") == expected


def test_a_failed_step_exits_with_1(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_run, "gpu_steps", lambda folder, rehearse: [step("bad", "raise SystemExit(3)")])
    result = CliRunner().invoke(app, ["gpu", "--rehearse", "--out", str(tmp_path / "gpu.json")])
    assert result.exit_code == 1
    assert json.loads((tmp_path / "gpu.json").read_text())["steps"][0]["exit_code"] == 3


def test_without_a_gpu_it_says_what_would_run(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["gpu", "--out", str(tmp_path / "gpu.json")])
    assert result.exit_code == 2
    message = " ".join(result.stderr.split())
    assert all(words in message for words in ("no CUDA GPU", "microbenchmarks", "--rehearse"))
    assert not (tmp_path / "gpu.json").exists()


def test_away_from_the_sources_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_run, "ROOT", tmp_path)
    result = CliRunner().invoke(app, ["gpu", "--rehearse", "--out", str(tmp_path / "gpu.json")])
    assert result.exit_code == 2
    assert "checkout" in result.stderr
