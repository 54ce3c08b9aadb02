"""``cachemoe info --predict``: the arithmetic, what a token reads, what is lent, what is measured, and the command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MODELS, save_random
from typer.testing import CliRunner

from cachemoe.benchmarks.cli import app
from cachemoe.kernels.formats import PageFormat
from cachemoe.kernels.rounded_cpu import Rounded
from cachemoe.moe.checkpoint import TINYMOE, Checkpoint
from cachemoe.moe.dense import dense_reads
from cachemoe.moe.layers import moe_layers
from cachemoe.moe.lent_misses import lent_misses
from cachemoe.moe.models import outline, small_model
from cachemoe.moe.predict import Landing, Speeds, TokenSizes, expert_seconds, token_seconds
from cachemoe.moe.speeds import Reading, dense_reading, experts_reading, page_landing
from cachemoe.offload.errors import InputError

pytest.importorskip("transformers")

SIZES = TokenSizes(layers=2, top_k=2, page_bytes=100, weight_bytes=80, dense={"int4": 50, "bfloat16": 30})
SPEEDS = Speeds({"int4": 100.0, "bfloat16": 10.0}, 80.0, Landing({1: 3.0, 2: 5.0}, True), token_s=7.0, missing_s=0.5)


def test_a_token_reads_dense_weights_and_experts():
    assert SIZES.memory_bytes == 50 + 30 + 2 * 2 * 80
    assert SIZES.disk_bytes(0.25) == 2 * 2 * 0.25 * 100


def test_hits_are_computed_while_pages_move():
    """An expert takes 1 s; the first page is there after 3 s, two after 5."""
    assert expert_seconds(0, SIZES, SPEEDS) == 2
    assert expert_seconds(1, SIZES, SPEEDS) == 3 + 1 + 0.5  # the hit's second is hidden
    assert expert_seconds(2, SIZES, SPEEDS) == 5 + 1 + 0.5  # and that of the first page
    fast = replace(SPEEDS, landing=Landing({1: 0.1, 2: 0.2}, True))
    assert expert_seconds(1, SIZES, fast) == 1 + 1 + 0.5  # now the page's way is
    assert expert_seconds(2, SIZES, fast) == pytest.approx(0.1 + 1 + 1 + 0.5)


def test_a_tokens_time_is_the_mean_over_how_many_miss():
    dense = 50 / 100 + 30 / 10
    assert token_seconds(SIZES, SPEEDS, 0.0) == pytest.approx(7 + dense + 2 * 2)
    assert token_seconds(SIZES, SPEEDS, 1.0) == pytest.approx(7 + dense + 2 * 6.5)
    layer = 0.75**2 * 2 + 2 * 0.25 * 0.75 * 4.5 + 0.25**2 * 6.5
    assert token_seconds(SIZES, SPEEDS, 0.25) == pytest.approx(7 + dense + 2 * layer)


def test_between_measured_counts_pages_land_on_a_line():
    landing = Landing({1: 3.0, 2: 4.0, 4: 8.0}, True)
    assert [landing.of(count) for count in (1, 2, 3, 4)] == [3, 4, 6, 8]


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("columns", [32, 96, 256])
def test_a_rounded_matrix_has_the_size_that_is_said_before(kind, columns):
    assert Rounded.size(24, columns, kind) == Rounded.of(torch.randn(24, columns), kind).nbytes


def test_a_token_reads_all_but_embedding_and_experts(tiny_checkpoint):
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    read = [t for name, t in tensors.items() if ".experts." not in name and "embed_tokens" not in name]
    assert dense_reads(outline(Checkpoint(tiny_checkpoint)), None) == {"bfloat16": sum(t.nbytes for t in read)}


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rounded_weights_are_those_that_load_rounds(opened, tiny_checkpoint, kind):
    model = outline(Checkpoint(tiny_checkpoint))
    whole, reads = dense_reads(model, None)["bfloat16"], dense_reads(model, kind)
    rounding = opened(dense=kind).cachemoe.dense
    assert reads == {kind: rounding.bytes_after, "bfloat16": whole - rounding.bytes_before}


def test_a_tied_head_is_read(tmp_path, tiny_checkpoint):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_checkpoint / name).read_bytes())
    own = dense_reads(outline(Checkpoint(tmp_path)), None)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert dense_reads(outline(Checkpoint(tmp_path)), None) == own


@pytest.mark.parametrize("name", MODELS)
def test_a_small_model_has_the_layers_and_experts_of_the_large(name, tmp_path):
    save_random(name, tmp_path)
    checkpoint = Checkpoint(tmp_path)
    model = small_model(checkpoint, torch.float32)
    layers, shape = moe_layers(model), checkpoint.shape
    assert [layer.count for layer in layers] == [shape.experts] * len(shape.layers)
    assert model.config.num_hidden_layers == 3
    with torch.inference_mode():
        assert model(torch.tensor([[1, 200, 255]])).logits.isfinite().all()


def test_a_real_models_widths_become_small(tmp_path):
    """Heads and latent widths as large as those of models that people run, and the model stays tiny."""
    save_random("deepseek_v3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    wide = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128}
    wide |= {"v_head_dim": 128, "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280}
    checkpoint = Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | wide))
    assert small_model(checkpoint, torch.bfloat16).num_parameters() < 1e6


def test_tinymoe_lends_the_misses_of_its_report(quiet):
    curve = lent_misses(quiet)
    report = json.loads((TINYMOE / "report.json").read_text())
    for row in report["original_routing_misses"]:  # of other, longer text
        assert curve.at(row["capacity"] / 60) == pytest.approx(row["lru"], abs=0.02)
    assert curve.at(1.0) == 0
    assert curve.at(15.5 / 60) == pytest.approx((curve.rates[15] + curve.rates[16]) / 2)
    assert sorted(curve.rates, reverse=True) == curve.rates
    with pytest.raises(InputError, match=r"a pool of 3.0% of the experts is less than the 4 of 60 .* --miss-rate"):
        curve.at(0.03)


def test_readings_take_turns():
    seen = []
    reading = Reading([lambda: seen.append("a"), lambda: seen.append("b")], 10, lambda: seen.append("call"))
    for _ in range(3):
        reading()
    assert seen == ["a", "call", "b", "call", "a", "call"] and len(reading.seconds) == len(reading.call_seconds) == 3
    # Of tokens that took 4, 2 and 10, of which a call takes a half.
    reading = Reading([], 10, None, [1.0, 3.0, 1.0, 1.0, 9.0, 1.0], [0.5, 0.5, 0.5, 8.0, 0.25, 0.5])
    assert reading.speed(2) == 2 * 10 / (4 - 2 * 0.5)
    assert reading.spent(4) == 9 + 1 + 0.25 + 0.5


@pytest.mark.parametrize("kind", ["int8", "int4", "bfloat16", "float32"])
def test_products_have_the_bytes_that_the_model_has(kind):
    reading = dense_reading(kind, 100, 1 << 20, 4)
    assert len(reading.runs) == 4 and 4 * reading.size == pytest.approx(1 << 20, rel=0.01)
    assert all(run().isfinite().all() for run in reading.runs)


@pytest.mark.parametrize(("kind", "group"), [("int4", 32), ("int8", 0), ("bf16", 0)])
def test_experts_take_turns_over_the_pool(kind, group):
    page_format = PageFormat(kind, 64, 32, group)
    reading = experts_reading(page_format, 2, 9 * page_format.page_bytes, torch.bfloat16)
    assert len(reading.runs) == 4 and reading.size == 2 * page_format.weight_bytes
    reading()
    assert reading.speed(1) > 0


def test_pages_land_and_nothing_is_left(tmp_path, quiet):
    landing = page_landing(PageFormat("int4", 64, 32, 32), 4, 24, tmp_path, quiet)
    assert list(landing.seconds) == [1, 2, 4] and min(landing.seconds.values()) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", [2, 24, 30])
def test_an_interrupt_leaves_nothing(tmp_path, after):
    """While the file is written, when it is, and while it is read."""
    from contextlib import contextmanager

    @contextmanager
    def interrupting(description, total):
        left = iter([None] * after)

        def advance():
            if next(left, "over") == "over":
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        page_landing(PageFormat("int4", 64, 32, 32), 4, 24, tmp_path, interrupting)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def info(tmp_path, monkeypatch, tiny_checkpoint):
    """Runs ``info`` on the tiny checkpoint; gives what it printed, or its refusal."""
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def command(*arguments, fails=False):
        result = CliRunner().invoke(app, ["info", str(tiny_checkpoint), *arguments])
        assert result.exit_code == (2 if fails else 0), result.output
        return " ".join((result.stderr if fails else result.stdout).split())

    return command


def test_info_predicts(info, tmp_path):
    said = info("--predict", "--format", "int4", "--dense", "int8", "--json", "predict.json")
    assert "The misses are lent: those of tinymoe" in said and "in pools of the same share of its experts" in said
    assert "Measured here: disk" in said
    report = json.loads(Path("predict.json").read_text())
    assert [row["pool"] for row in report["rows"]] == ["25%", "50%", "100%"]
    assert [row["slots"] for row in report["rows"]] == [[2, 2], [4, 4], [8, 8]]
    first, second, whole = report["rows"]
    assert first["miss_rate"] > second["miss_rate"] > whole["miss_rate"] == whole["disk_bytes_per_token"] == 0
    page = report["sizes"]["page_bytes"]
    assert first["pool_bytes"] == 4 * page
    assert first["disk_bytes_per_token"] == pytest.approx(2 * 2 * first["miss_rate"] * page)
    speeds = report["speeds"]
    landing = Landing({int(count): s for count, s in speeds["landing"]["seconds"].items()}, True)
    sizes, speeds = TokenSizes(**report["sizes"]), Speeds(**speeds | {"landing": landing})
    for row in report["rows"]:
        seconds = token_seconds(sizes, speeds, row["miss_rate"])
        assert (row["ms_per_token"], row["tokens_per_second"]) == pytest.approx((1e3 * seconds, 1 / seconds))
    left = {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert left <= {".so"}  # what C was compiled to


def test_info_takes_a_miss_rate(info):
    said = info("--predict", "--pool", "3", "--miss-rate", "14%", "--json", "predict.json")
    (row,) = json.loads(Path("predict.json").read_text())["rows"]
    assert row["miss_rate"] == 0.14 and "lent" not in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--predict", "--pool", "50%", "--miss-rate", "2"), "such as 14%, not '2'"),
        (("--predict", "--pool", "50%", "--miss-rate", "101%"), "such as 14%, not '101%'"),
        (("--predict", "--miss-rate", "14%"), "--miss-rate is of one pool: give one --pool with it"),
        (("--predict", "--pool", "3", "--pool", "4", "--miss-rate", "14%"), "--miss-rate is of one pool"),
        (("--predict", "--pool", "1"), "must lie between the 2 that a token uses"),
        (("--predict", "--pool", "many"), "a pool is a share such as 50%"),
        (("--predict", "--dense", "int2"), "--dense is int8 or int4, or left out, not 'int2'"),
        (("--predict", "--format", "int3"), "unknown page format 'int3'"),
        (("--predict", "--json", "."), "it is a folder"),
        (("--pool", "50%"), "--pool is for --predict: give that too, or leave --pool out"),
        (("--format", "int4"), "--format is for --predict"),
        (("--dense", "int4"), "--dense is for --predict"),
        (("--miss-rate", "14%"), "--miss-rate is for --predict"),
        (("--json", "x.json"), "--json is for --predict"),
    ],
)
def test_what_cannot_be_predicted_is_refused_in_a_sentence(info, arguments, words):
    said = info(*arguments, fails=True)
    assert words in said and said.startswith("cachemoe: ") and said.count("cachemoe: ") == 1
    assert not Path("x.json").exists()
