"""The table of systems: the front, who loses to chance, and one small run of the whole."""

import json
import math
import shutil
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cachemoe.benchmarks.cli import app
from cachemoe.benchmarks.systems_run import front_of, strategies_of
from cachemoe.benchmarks.systems_tables import BETTER, UNDECIDED, WORSE, against_chance
from cachemoe.moe.checkpoint import TINYMOE
from cachemoe.moe.policies import RULES
from cachemoe.moe.shape import MoeShape
from cachemoe.moe.strategies import Strategy

pytest.importorskip("transformers")


def row_of(name, windows):
    """A row of windows of 10 tokens: (missed bytes, nats more than the unmodified model's) of each."""
    count, more = len(windows), [more for _, more in windows]
    return {
        "name": name,
        "missed_bytes_per_token": sum(missed for missed, _ in windows) / count / 11,
        "perplexity_change": math.expm1(sum(more) / count / 10),
        "scored_tokens": 10 * count,
        "windows": {"missed_bytes": [missed for missed, _ in windows], "nats_more": more},
    }


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-5, 5)), min_size=1, max_size=12))
def test_the_front_is_of_those_that_no_other_beats(points):
    rows = [row_of(str(i), [(x, y / 10)]) for i, (x, y) in enumerate(points)]
    front = [points[int(name)] for name in front_of(rows)]
    for x, y in front:
        assert not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(front))
    for point in points:
        assert point in front or any(a <= point[0] and b <= point[1] for a, b in front)


def test_two_rows_are_compared_on_the_windows_of_both():
    short = row_of("short", [(5, 0.2)])
    # Worse in the first window, though better in both together.
    assert front_of([short, row_of("long", [(6, 0.3), (0, 0.0)])]) == ["short"]
    # Better in the first, though worse in both together.
    assert front_of([short, row_of("long", [(4, 0.1), (90, 9.0)])]) == ["long"]
    assert front_of([short, row_of("long", [(4, 0.3), (90, 9.0)])]) == ["short", "long"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_on_the_front(bad):
    row = row_of("bad", [(0, 0.0)]) | {"perplexity_change": bad}
    row["windows"]["nats_more"] = [bad]
    for rows in ([row, row_of("good", [(5, 0.2)])], [row_of("good", [(5, 0.2)]), row]):
        assert front_of(rows) == ["good"]


def test_what_is_said_of_a_system_beside_its_control():
    def row(name, difference, error):
        control = {"kl_difference": difference, "kl_difference_standard_error": error}
        return {"name": name, "kl_nats": 0.2, "control": control}

    rows = [row("a", 0.1, 0.01), row("b", -0.1, 0.01), row("c", 0.1, 0.06), row("d", -0.1, 0.06)]
    rows += [{"name": "exact", "kl_nats": 0.0, "control": None}, {"name": "resident"}]
    rows += [row("nan", math.nan, math.nan), row("infinite", -math.inf, math.nan), row("one block", 0.1, None)]
    expected = {BETTER: ["b"], UNDECIDED: ["c", "d", "nan", "infinite", "one block"], WORSE: ["a"]}
    assert against_chance(rows) == expected


@pytest.mark.parametrize("experts, k", [(60, 4), (8, 2), (128, 8), (16, 1)])
def test_every_system_is_in_the_table(experts, k):
    shape = MoeShape(tuple(range(4)), experts, k, 64, 64, 256, None)
    named = [Strategy.parse(text, experts, k, min(2, k - 1)) for text in strategies_of(shape)]
    paper = {
        "original",
        "max-rank",
        "cumsum",
    }  # the paper's own beside cache-prior, and what is only a control or a form
    others = {"relu-literal", "decoupled-hint", "decoupled-exec"}
    missing = set(RULES) - {strategy.name for strategy in named} - paper - others
    assert missing == ({"pruning"} if k == 1 else set())


def test_a_small_run(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    systems = ["cache-prior:0.5", "hobbit:0.4:0.7", "edgemoe:0.05", "moec-substitute:gate", "smola-lowrank:2"]
    systems += ["readme-lookahead:1", "adap-skip:0.01"]
    for file in TINYMOE.glob("tokenizer*"):
        shutil.copy(file, tiny_checkpoint)
    (tmp_path / "text").write_text("Once upon a time there was a router. " * 100)
    arguments = ["systems", "--model", tiny_checkpoint, "--payload", "native", "--tokens", "3", "--capacity", "75%"]
    arguments += ["--quality-tokens", "512", "--text", "text", "--text", "text"]
    arguments += ["--free", "2"]
    monkeypatch.setattr("cachemoe.benchmarks.systems_run.PROMPTS", 3)
    arguments += [part for system in systems for part in ("--strategy", system)]
    monkeypatch.setattr("cachemoe.benchmarks.systems_run.CONTEXT", 128)
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output + result.stderr
    report = json.loads((tmp_path / "results/systems.json").read_text())
    timed, scored = (run["capacities"][0]["rows"] for run in report["runs"])
    assert [row["name"] for row in scored] == ["original", *systems]
    rows = {row["name"]: row for row in timed}
    assert set(rows) == {"resident", "free misses", "original", *systems}
    assert all("ms_per_token" in row for row in timed) and not any("ms_per_token" in row for row in scored)
    assert abs(rows["original"]["kl_nats"]) < 1e-6 and abs(rows["readme-lookahead:1"]["kl_nats"]) < 1e-6
    assert rows["hobbit:0.4:0.7"]["cheap_per_token"] > 0 and rows["smola-lowrank:2"]["cheap_per_token"] > 0
    assert rows["moec-substitute:gate"]["swaps_per_token"] > 0
    for name in ("hobbit:0.4:0.7", "smola-lowrank:2", "edgemoe:0.05"):  # as many cheap ones, and dropped ones
        row, control = rows[name], rows[name]["control"]
        for count in ("experts_cheap", "k_eff", "experts_swapped"):
            assert control[count] == pytest.approx(row[count], rel=0.1, abs=0.01), (name, count)
        assert control["kl_nats"] > 0 and row["scored_tokens"] == (508 if name[0] == "s" else 127), name
    assert rows["readme-lookahead:1"]["control"] is None
    (free,) = (run["free_running"] for run in report["runs"] if "free_running" in run)
    assert [row["strategy"] for row in free["rows"]] == list(dict.fromkeys(["original", *front_of(timed[2:])]))
    assert free["free_running"]["prompts"] == 3 and "Free-running" in result.output
    for row in scored:
        pages = row["misses_per_token"] * report["runs"][0]["store"]["page_bytes"]
        assert row["missed_bytes_per_token"] <= pages + 1
    assert "Belady" in result.output and "By chance" in result.output
    assert (tmp_path / "results/systems.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "absent"), "absent is no checkpoint folder"),
        (("--json", "."), "it is a folder"),
        (("--payload", "best"), "unknown payload 'best'"),
        (("--free", "5000"), "--free 5000 after a prompt of 64 tokens is more than the 2048 tokens"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(arguments, words, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["systems", *arguments])
    message = " ".join(result.stderr.split())
    assert result.exit_code == 2, result.output
    assert message.startswith("cachemoe: ") and words in message
