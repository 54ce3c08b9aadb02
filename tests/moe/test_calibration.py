"""Calibration files: written, read again, and refused when they are none or of another model."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cachemoe.benchmarks.cli import app
from cachemoe.moe.calibration import DTYPES, KINDS, Calibration
from cachemoe.moe.checkpoint import TINYMOE
from cachemoe.moe.load import swap
from cachemoe.moe.models import load_model
from cachemoe.offload.errors import InputError

NEEDY = ("relu-route", "relu-literal", "naee-skip:0.5", "naee-prune:4", "adap-skip:0.005")
ABOUT = {"version": 2, "model": "abc", "name": "tiny", "k": 2, "tokens": 72, "cheaper": "int4"}


def parts(layers=2, experts=5):
    misses = torch.arange(experts, -1, -1).float().expand(layers, -1).clone()
    misses[:, :2] = math.inf
    return {
        "ratios": torch.linspace(0, 1, 1001).expand(layers, -1).contiguous(),
        "thresholds": torch.tensor([0.5, -0.25]),
        "sensitivities": torch.tensor([46.69, 0.0229]),
        "removal": torch.arange(experts).flip(0).short().expand(layers, -1).contiguous(),
        "misses": misses,
        "token_ids": torch.tensor([3, 7, 200], dtype=torch.int32),
        "by_token": torch.zeros(layers, 4, experts, dtype=torch.float16),
        "clusters": torch.arange(experts, dtype=torch.int16).expand(3, layers, -1).contiguous() // 2,
        "importance": torch.arange(layers * experts, dtype=torch.float32).view(layers, experts),
        "cheap_losses": torch.linspace(0, 0.8, 9),
        "hobbit": torch.tensor([1, 0, 2, 1], dtype=torch.int16),
    }


def written(path, about=None, **changes):
    tensors = parts() | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    text = about if isinstance(about, str) else json.dumps(ABOUT | (about or {}))
    save_file(tensors, path, metadata={"cachemoe-calibration": text})
    return path


def refusal(path):
    with pytest.raises(InputError) as caught:
        Calibration.load(path)
    said = str(caught.value)
    assert "\n" not in said and len(said.split()) > 4
    return said


def test_what_is_written_is_read(tmp_path):
    about = {name: ABOUT[name] for name in KINDS}
    made = Calibration(**parts(), **about)
    made.save(tmp_path / "folder" / "calibration.safetensors")
    for path in (tmp_path / "folder" / "calibration.safetensors", str(tmp_path / "folder" / "calibration.safetensors")):
        again = Calibration.load(path)
        assert {name: getattr(again, name) for name in KINDS} == about
        for name in DTYPES:
            assert torch.equal(getattr(again, name), getattr(made, name)), name
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["calibration.safetensors"]


def test_what_save_writes_is_what_these_tests_write(tmp_path):
    Calibration(**parts(), **{name: ABOUT[name] for name in KINDS}).save(tmp_path / "a")
    written(tmp_path / "b")
    assert refusal(tmp_path / "absent").startswith("there is no calibration at")
    assert Calibration.load(tmp_path / "b").k == 2
    a, b = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_path_that_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", ".", "absent"):
        assert "there is no calibration at" in refusal(tmp_path / name)


def test_other_files_are_refused(tmp_path, tiny_checkpoint):
    (tmp_path / "text").write_text("thresholds: 0.5")
    (tmp_path / "empty").touch()
    for path in (tiny_checkpoint / "model.safetensors", tmp_path / "text", tmp_path / "empty"):
        assert "is not a cachemoe calibration, or damaged" in refusal(path)


@pytest.mark.parametrize("left", [0, 1, 7, 8, 100, 1000, -1])
def test_a_truncated_file_is_refused(tmp_path, left):
    path = written(tmp_path / "calibration")
    path.write_bytes(path.read_bytes()[:left])
    assert "is not a cachemoe calibration, or damaged" in refusal(path)


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"version": 1}, "is a calibration of another version: make it again"),
        ({"version": "1"}, "another version"),
        ({"version": None}, "another version"),
        ({"model": 5}, "not a cachemoe calibration"),
        ({"name": None}, "not a cachemoe calibration"),
        ({"k": 2.0}, "not a cachemoe calibration"),
        ({"k": True}, "not a cachemoe calibration"),
        ({"k": 0}, "not a cachemoe calibration"),
        ({"k": 6}, "not a cachemoe calibration"),
        ({"tokens": "72"}, "not a cachemoe calibration"),
        ("{}", "not a cachemoe calibration"),
        ('["version", "model", "name", "k", "tokens"]', "not a cachemoe calibration"),
        ("[" * 100_000, "not a cachemoe calibration"),
        ("version 1", "not a cachemoe calibration"),
    ],
)
def test_metadata_that_cannot_be_is_refused(tmp_path, about, words):
    assert words in refusal(written(tmp_path / "calibration", about))


def with_value(name, value):
    tensor = parts()[name].clone()
    tensor.view(-1)[-1] = value
    return tensor


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        *((name, None, "not a cachemoe calibration") for name in DTYPES),
        *((name, parts()[name].double(), "not a cachemoe calibration") for name in DTYPES),
        *((name, parts()[name][:1], "not a cachemoe calibration") for name in DTYPES),
        *((name, parts()[name][..., :-1].contiguous(), "not a cachemoe calibration") for name in DTYPES),
        *((name, parts()[name][0].clone(), "not a cachemoe calibration") for name in DTYPES),
        ("thresholds", with_value("thresholds", math.nan), "has thresholds that are not finite"),
        ("thresholds", with_value("thresholds", -math.inf), "has thresholds that are not finite"),
        ("ratios", with_value("ratios", math.inf), "has ratios that are not finite"),
        ("sensitivities", with_value("sensitivities", math.nan), "has sensitivities that are not finite"),
        ("removal", with_value("removal", 1), "not a cachemoe calibration"),
        ("removal", with_value("removal", -1), "not a cachemoe calibration"),
        ("removal", with_value("removal", 5), "not a cachemoe calibration"),
        ("misses", with_value("misses", math.nan), "not a cachemoe calibration"),
        ("misses", with_value("misses", math.inf), "not a cachemoe calibration"),
        ("misses", with_value("misses", -1.0), "not a cachemoe calibration"),
        ("misses", torch.full((2, 6), math.inf), "not a cachemoe calibration"),
        ("misses", torch.zeros(2, 6), "not a cachemoe calibration"),
        ("removal", torch.zeros(0, 0, dtype=torch.int16), "not a cachemoe calibration"),
        ("token_ids", torch.tensor([3, 200, 7], dtype=torch.int32), "not a cachemoe calibration"),
        ("token_ids", torch.tensor([3, 3, 7], dtype=torch.int32), "not a cachemoe calibration"),
        ("token_ids", torch.tensor([-1, 3, 7], dtype=torch.int32), "not a cachemoe calibration"),
        ("by_token", with_value("by_token", math.nan), "has by_token that are not finite"),
        ("clusters", with_value("clusters", -1), "not a cachemoe calibration"),
        ("importance", with_value("importance", math.inf), "has importance that are not finite"),
        ("importance", with_value("importance", -1.0), "not a cachemoe calibration"),
        ("cheap_losses", with_value("cheap_losses", math.nan), "has cheap_losses that are not finite"),
        ("hobbit", torch.zeros(4, dtype=torch.int16), "not a cachemoe calibration"),
        ("hobbit", with_value("hobbit", -1), "not a cachemoe calibration"),
    ],
)
def test_parts_that_cannot_be_are_refused(tmp_path, name, tensor, words):
    assert words in refusal(written(tmp_path / "calibration", **{name: tensor}))


def test_a_table_of_no_tokens_is_refused(tmp_path):
    nothing = {"token_ids": torch.zeros(0, dtype=torch.int32), "by_token": torch.zeros(2, 1, 5, dtype=torch.float16)}
    assert "not a cachemoe calibration" in refusal(written(tmp_path / "calibration", **nothing))


def test_quantiles_between_two_that_are_kept():
    made = Calibration(**parts(), **{name: ABOUT[name] for name in KINDS})
    for q in (0.0, 0.25, 0.3337, 0.99999, 1.0):
        torch.testing.assert_close(made.ratio(q), torch.full((2,), q))


@pytest.mark.parametrize("tolerated", [0.0, 0.05, 0.1, 0.3, 0.84, 1.2, 9.0])
def test_as_many_experts_are_cheap_as_cost_what_is_tolerated(tolerated):
    """Ten experts whose loss is 0.08 nats each: a share P of perplexity is log(1 + P) nats."""
    made = Calibration(**parts(), **{name: ABOUT[name] for name in KINDS})
    cheap = min(10, int(math.log1p(tolerated) / 0.08))
    assert made.bits(tolerated).flatten().tolist() == [1] * cheap + [0] * (10 - cheap)


def test_a_calibration_of_another_cheaper_format_is_refused():
    made = Calibration(**parts(), **{name: ABOUT[name] for name in KINDS})
    made.check(None, 2, 5, made.k, "int4")
    with pytest.raises(InputError, match=r"measured int4 pages, and these are int2: .* --cheaper int2"):
        made.check(None, 2, 5, made.k, "int2")


# --------------------------------------------------------------------------------------------------- of which model


def test_load_takes_a_calibration_of_this_model(opened, tiny_calibration):
    for routing in (*NEEDY, "original", "cache-prior:0.5"):
        model = opened(routing=routing, calibration=tiny_calibration)
        with torch.inference_mode():
            assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
        assert model.cachemoe.label == {"naee-prune:4": "experts changed", "original": "exact"}.get(
            routing, "routing changed"
        )


@pytest.mark.parametrize("routing", ["original", "naee-skip:0.5"])
def test_load_refuses_a_calibration_of_another_model(opened, tiny_calibration, tmp_path, routing):
    known = Calibration.load(tiny_calibration)
    experts = torch.arange(7, dtype=torch.int16).expand(2, -1)
    others = (
        replace(known, model="f" * 32),
        replace(known, k=1, misses=with_finite_from(known.misses, 1)),
        replace(
            known,
            removal=experts,
            misses=known.misses[:, :8],
            **{n: getattr(known, n)[..., :7] for n in ("by_token", "clusters", "importance")},
        ),
    )
    for i, other in enumerate(others):
        other.save(tmp_path / str(i))
        with pytest.raises(InputError, match="the calibration is of another model, tiny, or of weights") as caught:
            opened(routing=routing, calibration=tmp_path / str(i))
        assert "\n" not in str(caught.value)


def with_finite_from(misses, k):
    misses = misses.clone()
    misses[:, k:] = misses[:, k:].nan_to_num(posinf=9.0)
    return misses


@pytest.mark.parametrize("routing", NEEDY)
def test_a_strategy_that_needs_one_says_so(opened, tiny_checkpoint, routing):
    name = routing.partition(":")[0]
    words = f"{name} needs a calibration of the model: make one with `cachemoe calibrate MODEL --out FILE`, and give it"
    model = opened()
    for call in (
        lambda: opened(routing=routing),
        lambda: setattr(model.cachemoe, "routing", routing),
        lambda: swap(load_model(tiny_checkpoint), routing=routing),
    ):
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert model.cachemoe.routing.name == "original"


def test_swap_takes_a_calibration(tiny_checkpoint, tiny_calibration, quiet, opened):
    loaded = opened(routing="naee-skip:0.5", calibration=tiny_calibration)
    model = load_model(tiny_checkpoint, torch.bfloat16)
    swap(model, routing="naee-skip:0.5", calibration=tiny_calibration, progress=quiet)
    with torch.inference_mode():
        tokens = torch.tensor([[1, 20, 30, 90]])
        torch.testing.assert_close(model(tokens).logits, loaded(tokens).logits, rtol=2e-2, atol=2e-2)
    model.cachemoe.close()


# ------------------------------------------------------------------------------------------------------- the commands


@pytest.fixture
def run(tmp_path, stores, monkeypatch):
    """Runs the command in a folder of its own; gives what it printed, or its refusal."""
    monkeypatch.setenv("CACHEMOE_CACHE", str(stores))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)

    def command(*arguments, fails=False):
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == (2 if fails else 0), result.output
        return " ".join(result.stderr.split()) if fails else result.stdout

    return command


@pytest.fixture
def speaking(tiny_checkpoint, tmp_path):
    """``tiny_checkpoint`` with a tokenizer, of bytes too."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "speaking")
    for file in Path(TINYMOE).glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_commands_end_with_2_where_the_calibration_is_missing(run, speaking):
    words = "needs a calibration of the model: make one with `cachemoe calibrate"
    assert words in run("generate", speaking, "--prompt", "x", "--routing", "naee-skip:0.5", fails=True)
    (speaking.parent / "text").write_text("The text.\n" * 20)
    options = ("--text", "text", "--tokens", "40", "--context", "20", "--capacity", "50%")
    assert words in run("quality", speaking, *options, "--strategy", "adap-skip:0.005", fails=True)
    for command in (("generate", speaking, "--prompt", "x"), ("quality", speaking, *options)):
        assert "there is no calibration at absent" in run(*command, "--calibration", "absent", fails=True)
    said = run("generate", speaking, "--prompt", "x", "--capacity", "adaptive", fails=True)
    assert "an adaptive capacity needs a calibration" in said


def test_a_calibration_is_made_and_used(run, speaking, tmp_path):
    (tmp_path / "text").write_text("Experts are calibrated on a text that is like what they will see. " * 10)
    options = ("--text", "text", "--tokens", "72", "--context", "24")
    said = run("calibrate", speaking, *options, "--out", "calibration.safetensors")
    assert "speaking, 2 layers, 8 experts, 72 tokens." in said
    run("calibrate", speaking, *options, "--out", "calibration.safetensors")  # in its place
    known = ("--calibration", "calibration.safetensors")
    run("generate", speaking, "--prompt", "x", "--tokens", "3", "--routing", "adap-skip:0.5", *known)
    run("generate", speaking, "--prompt", "x", "--tokens", "3", "--capacity", "adaptive", *known)
    more = (
        "--capacity",
        "50%",
        "--strategy",
        "naee-skip:0.5",
        "--strategy",
        "smola-lowrank:1",
        "--json",
        "quality.json",
    )
    run("quality", speaking, *options, *more, *known)
    report = json.loads((tmp_path / "quality.json").read_text())
    original, skipped, surrogate = report["rows"]
    assert report["calibration"] == "calibration.safetensors"
    assert original["k_eff"] == 2 and original["control"] is None
    assert 1.35 < skipped["k_eff"] < 1.65 and skipped["control"]["kl_nats"] > 0
    assert surrogate["experts_cheap"] > 0 and surrogate["control"]["kl_nats"] > 0
    (tmp_path / "other").write_text("another file")
    assert "is not a cachemoe calibration" in run("calibrate", speaking, *options, "--out", "other", fails=True)
    assert (tmp_path / "other").read_text() == "another file"
