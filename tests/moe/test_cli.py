"""The commands on a user's own checkpoint, as a user types them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cachemoe.benchmarks.cli import app
from cachemoe.moe.checkpoint import DEFAULT_MODEL, TINYMOE
from cachemoe.moe.trace import RoutingTrace
from cachemoe.offload.store import ExpertStore

pytest.importorskip("transformers")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command in a folder and a cache of its own; gives what it printed, or its refusal."""
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # load takes a GPU where there is one
    monkeypatch.chdir(tmp_path)

    def command(*arguments, fails=False):
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == (2 if fails else 0), result.output
        return " ".join(result.stderr.split()) if fails else result.stdout

    return command


def test_info_says_what_fits(run):
    said = run("info", TINYMOE, "--memory", "12MB")
    assert "8 MoE layers of 60 experts, 4 used" in said
    (row,) = (line.split() for line in said.splitlines() if line.startswith(" bf16"))
    assert row[1:] == ["32.8", "kB", "15.7", "MB", "983", "kB", "1.05", "MB", "34", "of", "60", "454", "kB"]


def test_a_packed_store_generates(run, tmp_path):
    said = run("pack", TINYMOE, "--format", "int4", "--out", "stores/tiny.safetensors")
    assert "480 pages of int4" in said and "root mean square" in said
    with ExpertStore(tmp_path / "stores" / "tiny.safetensors") as store:
        store.verify()
    arguments = ("generate", TINYMOE, "--prompt", "The assignment statement ", "--tokens", "24")
    said = run(*arguments, "--store", "stores/tiny.safetensors", "--routing", "cache-prior:0.5")
    assert said.startswith("The assignment statement ") and len(said.strip()) > 35  # one text, from the prompt on
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").glob("*.safetensors"))


def test_quality_is_the_latency_tables(run, tmp_path):
    """The same model, text, caches and figures, through load and through the whole model."""
    (tmp_path / "text").write_text("Experts that are resident come first where the model would hardly notice. " * 40)
    common = ("--text", "text", "--capacity", "50%", "--strategy", "cache-prior:0.2", "--context", "128")
    run("quality", DEFAULT_MODEL, *common, "--tokens", "1024", "--json", "quality.json", "--pool", "50%")
    plain = ("--payload", "native", "--tokens", "6", "--quality-tokens", "1024", "--json", "latency.json")
    run("latency", *common, *plain, "--plot", "latency.png")
    quality = json.loads((tmp_path / "quality.json").read_text())
    latency = json.loads((tmp_path / "latency.json").read_text())
    rows = {row["name"]: row for row in latency["capacities"][0]["rows"]}
    assert [row["strategy"] for row in quality["rows"]] == ["original", "cache-prior:0.2"]
    for row in quality["rows"]:
        other = rows[row["strategy"]]
        for name in ("miss_rate", "top1_agreement"):
            assert row[name] == pytest.approx(other[name], abs=1e-3)
        for name in ("perplexity", "kl_nats"):
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4)
    assert quality["rows"][0]["kl_nats"] == pytest.approx(0, abs=1e-6)


def test_quality_of_what_is_decoded_freely(run):
    common = ("--tokens", "256", "--context", "128", "--capacity", "50%", "--strategy", "cache-prior:0.5")
    said = run("quality", TINYMOE, *common, "--free", "3", "--prompts", "2", "--json", "quality.json")
    report = json.loads(Path("quality.json").read_text())
    assert "Free-running: 3 tokens, greedily, after each of 2 prompts of 64" in said
    assert report["free_running"]["own_bits"] > 0
    original, prior = report["rows"]
    assert original["free_running"] is None
    figures = prior["free_running"]
    for each in (figures, figures["control"]):
        low, high = each["interval"]
        assert len(each["excess_bits_of_prompts"]) == 2 and low <= each["excess_bits"] <= high
    (row,) = (line for line in said.splitlines()[-6:] if "cache-prior" in line)
    assert f"{figures['excess_bits']:+.3f}" in row and f"{figures['control']['excess_bits']:+.3f}" in row

    said = run("quality", TINYMOE, *common, "--json", "quality.json")
    report = json.loads(Path("quality.json").read_text())
    assert "Free-running" not in said and report["free_running"] is None
    assert all(row["free_running"] is None for row in report["rows"])


def test_a_trace_has_the_routers_of_the_text(run, tmp_path):
    (tmp_path / "text").write_text("A routing trace, for policies without the model.\n" * 20)
    run("trace", TINYMOE, "--text", "text", "--tokens", "300", "--context", "128", "--out", "trace.safetensors")
    trace = RoutingTrace.load(tmp_path / "trace.safetensors")
    assert trace.logits.shape == (8, 256, 60) and trace.ids.shape == (8, 256, 4)
    assert bytes(trace.tokens.tolist()) == (tmp_path / "text").read_bytes()[:256]
    assert (trace.name, trace.context) == ("tinymoe", 128)
    chosen = trace.logits.float().gather(2, trace.ids.long()).amin(2)  # of float16: equals may change places
    assert (chosen >= trace.logits.float().topk(4).values[..., -1]).all()


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(TINYMOE, tmp_path / "model")


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_a_tokenizer_gives_and_no_model_takes_is_left_out(run, copy):
    names = ["input_ids", "token_type_ids", "attention_mask"]
    edit_json(copy / "tokenizer_config.json", model_input_names=names)
    expected = run("generate", TINYMOE, "--prompt", "The ", "--tokens", "5")
    assert run("generate", copy, "--prompt", "The ", "--tokens", "5") == expected


def test_a_tokenizer_that_cannot_be_had_ends_in_a_sentence(run, copy):
    (copy / "tokenizer.json").write_text("{}")
    for command in (("generate", copy, "--prompt", "x"), ("quality", copy), ("trace", copy, "--out", "x")):
        assert "transformers cannot load the tokenizer of" in run(*command, fails=True)
    for file in copy.glob("*token*"):
        file.unlink()
    assert "has no tokenizer: copy the model's" in run("generate", copy, "--prompt", "x", fails=True)


def test_another_models_tokenizer_is_refused(run, copy, monkeypatch):
    monkeypatch.setattr("cachemoe.moe.text.int", lambda _: 256, raising=False)
    for command in (("generate", copy, "--prompt", "x"), ("quality", copy, "--tokens", "64", "--context", "32")):
        assert "gives token 256, and the model has 256" in run(*command, fails=True)


def test_what_transformers_raises_while_generating_ends_in_a_sentence(run, copy):
    edit_json(copy / "generation_config.json", cache_implementation="some")
    said = run("generate", copy, "--prompt", "x", fails=True)
    assert "cannot go on from the prompt: " in said or "transformers cannot load" in said


def test_figures_that_are_not_finite_are_null_and_say_why(run, copy):
    """A model gone astray: its perplexity is more than a float holds."""
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] *= 3000
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    options = ("--tokens", "64", "--context", "32", "--capacity", "50%", "--strategy", "cache-prior:0.5")
    said = run("quality", copy, *options, "--json", "quality.json")
    report = json.loads(Path("quality.json").read_text(), parse_constant=pytest.fail)
    assert report["unmodified"]["perplexity"] is None and "inf" in said
    assert report["unmodified"]["not_finite"] == {"perplexity": "inf: more than a float holds"}
    assert report["unmodified"]["nats_per_token"] > 709
    for row in report["rows"]:
        assert row["perplexity"] is None and 0 <= row["miss_rate"] <= 1 and 0 <= row["top1_agreement"] <= 1


def test_info_and_pack_refuse_what_load_refuses(run, copy):
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith("o_proj.weight"))
    del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    for command in (("info", copy), ("pack", copy, "--out", "x"), ("generate", copy, "--prompt", "x")):
        assert f"lacks 1 of the model's tensors, {name} first" in run(*command, fails=True)
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("info", "absent", "--revision", "main"), "no checkpoint folder"),
        (("info", TINYMOE, "--revision", "main"), "is a folder, which has no revision main"),
        (("info", "absent"), "no checkpoint folder"),
        (("info", "nobody/absent"), "no folder nobody/absent, and the Hugging Face hub"),
        (("info", TINYMOE, "--memory", "plenty"), "no size such as 6GiB"),
        (("pack", TINYMOE, "--format", "int3", "--out", "x"), "unknown page format 'int3'"),
        (("pack", TINYMOE, "--out", "."), "it is a folder"),
        (("pack", TINYMOE, "--out", "precious"), "precious is not a cachemoe store"),
        (("trace", TINYMOE, "--out", "precious"), "precious is not a cachemoe trace"),
        (("generate", TINYMOE, "--prompt", ""), "--prompt is empty"),
        (("generate", TINYMOE, "--prompt", "x", "--pool", "1%"), "must lie between the 4"),
        (("generate", TINYMOE, "--prompt", "x", "--routing", "best"), "unknown strategy 'best'"),
        (("generate", TINYMOE, "--prompt", "x", "--store", "absent"), "there is no store at absent"),
        (("quality", TINYMOE, "--text", "absent"), "absent cannot be read"),
        (("quality", TINYMOE, "--context", "100000", "--tokens", "100000"), "more than the 2048 tokens"),
        (("quality", TINYMOE, "--tokens", "100"), "--tokens 100 is less than one --context of 512"),
        (("quality", TINYMOE, "--free", "-1"), "--free is a number of tokens, 0 for none, not -1"),
        (
            ("quality", TINYMOE, "--free", "2000"),
            "after a prompt of 64 tokens is more than the 2048",
        ),
        (("quality", TINYMOE, "--free", "8", "--tokens", "512"), "16 prompts of 64 tokens are more than the 512"),
        (("trace", TINYMOE, "--text", "absent", "--out", "x"), "absent cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(run, arguments, words, tmp_path):
    (tmp_path / "precious").write_text("not to be replaced")
    said = run(*arguments, fails=True)
    assert words in said
    assert (tmp_path / "precious").read_text() == "not to be replaced"
    assert not list(tmp_path.glob("**/*.partial")) and not (tmp_path / "x").exists()
