"""The table of systems: the front, who loses to chance, and one small run of the whole."""

import json
import shutil
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cachemoe.benchmarks.cli import app
from cachemoe.benchmarks.systems_run import front_of, strategies_of
from cachemoe.benchmarks.systems_tables import losers
from cachemoe.moe.checkpoint import TINYMOE
from cachemoe.moe.policies import RULES
from cachemoe.moe.shape import MoeShape
from cachemoe.moe.strategies import Strategy

pytest.importorskip("transformers")


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-5, 5)), min_size=1, max_size=12))
def test_the_front_is_of_those_that_no_other_beats(points):
    rows = [
        {"name": str(i), "missed_bytes_per_token": x, "perplexity_change": y / 10} for i, (x, y) in enumerate(points)
    ]
    front = [points[int(name)] for name in front_of(rows)]
    for x, y in front:
        assert not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(front))
    for point in points:
        assert point in front or any(a <= point[0] and b <= point[1] for a, b in front)


def test_who_diverges_more_than_chance_loses():
    rows = [
        {"name": "a", "kl_nats": 0.2, "control_kl_nats": 0.1},
        {"name": "b", "kl_nats": 0.1, "control_kl_nats": 0.2},
        {"name": "c", "kl_nats": 0.0, "control_kl_nats": None},
        {"name": "d", "kl_nats": 0.2, "control_kl_nats": 0.19999},
        {"name": "resident"},
    ]
    assert losers(rows) == ["a"]


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
    assert rows["smola-lowrank:2"]["control_kl_nats"] is not None
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
