"""The report of ``cachemoe gpu`` in the terminal: what became of each step, and the microbenchmarks' tables."""

from rich import box
from rich.table import Table

from cachemoe.benchmarks.micro_report import micro_notes, micro_tables

STYLES = {"passed": "green"}


def gpu_tables(report: dict) -> list[Table]:
    """The microbenchmarks, then the steps."""
    figures = _figures(report)
    title = "rehearsal on the CPU: no GPU was used" if report["rehearsal"] else "on the GPU"
    steps = Table(title=f"Steps, {title}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("step", "status", "seconds", "limit", "tests"):
        steps.add_column(heading, justify="right" if heading in ("seconds", "limit") else "left")
    for step in report["steps"]:
        ran = [f"{step[name]:.0f}" if name in step else "" for name in ("seconds", "limit_s")]
        status = f"[{STYLES.get(step['status'], 'red')}]{step['status']}[/]"
        steps.add_row(step["name"], status, *ran, _counts(_tests(step)))
    return [*(micro_tables(figures) if figures else []), steps]


def gpu_summary(report: dict) -> list[str]:
    """The microbenchmarks' notes, and what failed: the tests' messages and the end of the step's output."""
    figures = _figures(report)
    said = list(micro_notes(figures)) if figures else []
    for step in report["steps"]:
        if complaint := step.get("result", {}).get("complaint"):
            said.append(f"{step['name']}: {complaint}")
        tests = _tests(step)
        said += [f"{step['name']}: {f['test']}: {f['message']}" for f in tests["failures"]] if tests else []
        if "output_tail" in step:
            said.append(f"{step['name']} {step['status']}; the end of its output:\n{step['output_tail']}")
    return said


def _figures(report: dict) -> dict | None:
    return next((step["result"]["figures"] for step in report["steps"] if "figures" in step.get("result", {})), None)


def _tests(step: dict) -> dict | None:
    result = step.get("result", {})
    return result.get("tests", result if "failures" in result else None)


def _counts(tests: dict | None) -> str:
    return ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "skipped")) if tests else ""
