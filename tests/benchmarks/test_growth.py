"""``cachemoe growth``: its counts held to hooks on the routers, its bound to arithmetic, and one small run of all."""

import json
from contextlib import closing, nullcontext
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from cachemoe.benchmarks import growth_run
from cachemoe.benchmarks.cli import app
from cachemoe.benchmarks.growth_batches import by_chance
from cachemoe.benchmarks.growth_decode import Step, StepBytes, decode, dense_bytes, read_prompt, step_bytes
from cachemoe.benchmarks.growth_models import made
from cachemoe.benchmarks.growth_points import AXES, TOP_K, WARM_UP, base_of, points_of
from cachemoe.benchmarks.growth_run import Measured, prose
from cachemoe.benchmarks.speeds import memory_bandwidth
from cachemoe.moe.checkpoint import STEEPMOE, TINYMOE, Checkpoint
from cachemoe.moe.fingerprint import fingerprint, forget
from cachemoe.moe.text import held_out_text
from cachemoe.offload.errors import InputError

pytest.importorskip("transformers")
H, I, LAYERS, EXPERTS = 64, 32, 2, 8
BASE = base_of(H, I, 64)
SHAPE = replace(BASE.shape, layers=tuple(range(LAYERS)), experts=EXPERTS)


def quiet(description, total):
    return nullcontext(lambda: None)


def hooked(model):
    """Of each layer a list, to which every call of its router adds the set of experts that it chose."""
    seen = [[] for _ in model.model.layers]

    def hook(chosen):
        return lambda gate, given, answer: chosen.append(
            set(next(part for part in answer if part.dtype == torch.int64).flatten().tolist())
        )

    for layer, chosen in zip(model.model.layers, seen, strict=True):
        layer.mlp.gate.register_forward_hook(hook(chosen))
    return seen


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of 2 layers of 8 experts in int4."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHEMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        with made(SHAPE, "int4", quiet) as files:
            yield files


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_checkpoint):
    """What the command prints and writes at the smallest sizes, its folder, and the cache directory."""
    folder = tmp_path_factory.mktemp("run")
    points = {"context": (8, 12), "experts": (8, 16), "layers": (1, 2), "batch": (1, 3), "pool": (4, "50%", "100%")}
    sizes = ("--hidden", H, "--intermediate", I, "--rounds", 3, "--tokens", 1)
    named = [word for axis, values in points.items() for value in values for word in (f"--{axis}", value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHEMOE_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        patch.setattr(growth_run, "memory_bandwidth", lambda: memory_bandwidth(1 << 22))
        patch.setattr(growth_run, "SHIPPED", (tiny_checkpoint,))  # trained ones take many seconds
        result = CliRunner(env={"COLUMNS": "80"}).invoke(app, list(map(str, ("growth", *sizes, *named))))
    assert result.exit_code == 0, result.output + result.stderr
    return result.stdout, json.loads((folder / "results" / "growth.json").read_text()), folder


def test_the_report_has_the_points_asked_for(run):
    _, report, _ = run
    rows = report["axes"]
    assert list(rows) == list(AXES)
    assert [row["context"] for row in rows["context"]] == [8, 12]
    assert [row["experts"] for row in rows["experts"]] == [8, 16]
    assert [row["layers"] for row in rows["layers"]] == [1, 2]
    assert [row["sequences"] for row in rows["batch"]] == [1, 3]
    assert [row["slots"] for row in rows["pool"]] == [4, 16, 32]
    for axis, each in rows.items():
        for row in each:
            assert [len(times) for times in row["seconds"]] == [1, 1, 1]
            of_base = {"layers": 4, "experts": 32, "context": 64, "sequences": 1, "slots": row["experts"]}
            of_base.pop({"batch": "sequences", "pool": "slots"}.get(axis, axis))
            assert {name: row[name] for name in of_base} == of_base
            assert len(row["unique_experts_by_layer"]) == row["layers"]
            assert row["label"] == "precision changed"


def test_the_figures_agree_with_each_other(run):
    _, report, _ = run
    speeds, counted = report["speeds"], report["batches"][0]
    assert speeds["memory_bytes_per_second"] == max(speeds["memory_measurements"])
    for row in (row for rows in report["axes"].values() for row in rows):
        read = row["bytes"]
        assert read["dense"] + read["experts"] + read["keys_values"] == pytest.approx(row["memory_bytes"])
        assert read["experts"] == pytest.approx(sum(row["unique_experts_by_layer"]) * counted["weight_bytes"], rel=1e-6)
        seconds = row["memory_bytes"] / speeds["memory_bytes_per_second"]
        seconds += row["disk_bytes"] / speeds["disk_bytes_per_second"]
        assert row["bound_ms"] == pytest.approx(1e3 * seconds)
        assert row["disk_bytes"] == pytest.approx(row["misses"] * counted["page_bytes"])
        times = sorted(seconds for (seconds,) in row["seconds"])
        spread = row["ms_per_step"]
        assert [spread["min"], spread["median"], spread["max"]] == pytest.approx([1e3 * each for each in times])
        # Of each token before, in each layer: H numbers of 2 bytes in its key, and as many in its value.
        assert read["keys_values"] == 4 * H * row["layers"] * row["sequences"] * row["context"]
        if row["sequences"] == 1:
            assert row["unique_experts_by_layer"] == [TOP_K] * row["layers"]
    for row in (row for axis, rows in report["axes"].items() for row in rows if axis != "pool"):
        assert row["disk_bytes"] == 0
    least, half, whole = (row["disk_bytes"] for row in report["axes"]["pool"])
    assert least > half > whole == 0


def test_each_sequence_in_a_batch_is_held_to_itself_alone(run):
    _, report, _ = run
    (measured,) = report["batch_quality"]
    assert (measured["model"], measured["routing"], measured["pool"]) == ("tiny", "cache-prior:0.5", "50%")
    alone, *others = measured["rows"]
    assert [row["sequences"] for row in measured["rows"]] == [1, 2, 4, 8]
    assert set(alone["more_than_alone"].values()) == {0.0}
    for row in others:
        more = [b - a for a, b in zip(alone["bits_per_token"], row["bits_per_token"], strict=True)]
        spread = row["more_than_alone"]
        assert (spread["min"], spread["max"]) == pytest.approx((min(more), max(more)), abs=1e-6)
        assert any(each != 0 for each in more)  # the cache is another's, too
        assert row["misses_per_step"] > alone["misses_per_step"]
    # A model that knows nothing takes a byte for a byte, or more where it is sure of what is wrong.
    assert all(7.5 < each < 20 for each in alone["bits_per_token"]), alone["bits_per_token"]


def test_batches_of_each_model_are_counted(run):
    _, report, _ = run
    assert [counts["model"] for counts in report["batches"]] == ["synthetic", "tiny"]
    assert [counts["label"] for counts in report["batches"]] == ["precision changed", "exact"]
    assert growth_run.SHIPPED == (TINYMOE, STEEPMOE)
    for counts in report["batches"]:
        whole, half = (pool["rows"] for pool in counts["pools"])
        assert [pool["slots"] for pool in counts["pools"]] == [counts["experts"], counts["experts"] // 2]
        assert [row["sequences"] for row in whole] == [row["sequences"] for row in half] == list(range(1, 9))
        assert whole[0]["unique_experts_by_layer"] == [counts["top_k"]] * counts["layers"]
        for row, halved in zip(whole, half, strict=True):
            unique = row["unique_experts_by_layer"]
            assert all(counts["top_k"] <= each <= row["sequences"] * counts["top_k"] for each in unique)
            assert row["disk_bytes"] == 0
            # A batch's own tokens may drive a page out that another of them needs: it is then read once more.
            assert halved["disk_bytes"] >= halved["misses"] * counts["page_bytes"] * (1 - 1e-9)
            assert row["bytes"]["experts"] == pytest.approx(sum(unique) * counts["weight_bytes"])
        assert half[-1]["disk_bytes"] > 0


def test_tables_of_80_columns_and_the_picture_are_there_and_no_model_is_left(run):
    output, _, folder = run
    assert max(map(len, output.splitlines())) <= 80
    for words in (
        "Decode by context",
        "Decode by pool",
        "tiny, bf16: 2 of 8 experts a token",
        "The bound: what a step reads",
    ):
        assert words in output
    assert (folder / "results" / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("*.partial"))
    assert not [each for each in (folder / "cache").rglob("*") if "growth" in each.name]


@pytest.mark.parametrize("sequences", [1, 3])
def test_unique_experts_are_those_that_hooks_on_the_routers_see(files, sequences):
    text = prose(sequences, 12)
    with closing((model := files.load("100%", "int4", quiet)).cachemoe):
        past, seen = read_prompt(model, text[:, :6]), hooked(model)
        steps = decode(model, past, text[:, 6:])
        assert past.get_seq_length() == 6
    assert [step.unique for step in steps] == [[len(seen[i][t]) for i in range(LAYERS)] for t in range(6)]
    assert sequences == 3 or [step.unique for step in steps] == [[TOP_K] * LAYERS] * 6
    assert all(step.disk_bytes == step.misses == 0 for step in steps)
    assert [step.keys_values_bytes for step in steps] == [4 * H * LAYERS * sequences * n for n in range(6, 12)]


def test_a_pool_of_what_a_token_uses_reads_who_was_not_in_the_token_before(files):
    text = prose(1, 16)
    with closing((model := files.load(str(TOP_K), None, quiet)).cachemoe):
        past, seen = read_prompt(model, text[:, :6]), hooked(model)
        steps = decode(model, past, text[:, 6:])
        page_bytes = model.cachemoe.engine.page_format.page_bytes
    missed = [sum(len(each[t] - each[t - 1]) for each in seen) for t in range(1, 10)]
    assert [step.misses for step in steps[1:]] == missed and sum(missed) > 0
    assert [step.disk_bytes for step in steps] == [step.misses * page_bytes for step in steps]


def test_a_decode_goes_on_from_the_same_tokens_each_time(files):
    text = prose(1, 10)
    with closing((model := files.load("100%", "int4", quiet)).cachemoe), torch.inference_mode():
        past = read_prompt(model, text[:, :6])
        decode(model, past, text[:, 6:])
        given = model(text[:, 6:7], past_key_values=past, use_cache=True).logits
        expected = model(text[:, 6:7], past_key_values=read_prompt(model, text[:, :6]), use_cache=True).logits
    assert torch.equal(given, expected)


@pytest.mark.parametrize("dense", [None, "int4"])
def test_dense_weights_are_all_that_are_neither_experts_nor_embedding(files, dense):
    with closing((model := files.load("100%", dense, quiet)).cachemoe):
        counted = dense_bytes(model)
        buffers = sum(each.nbytes for each in model.model.rotary_emb.buffers())
    checkpoint = Checkpoint(files.checkpoint)
    entries = {name: each for name, each in checkpoint.tensors.entries.items() if not checkpoint.is_expert(name)}
    del entries["model.embed_tokens.weight"]
    expected = buffers
    for name, each in entries.items():
        rounded = dense is not None and ("_proj" in name or name == "lm_head.weight")
        numbers = torch.Size(each.shape).numel()
        # int4: half a byte a number; of H = 64 a group of 64, whose scale and zero are two of bfloat16.
        expected += numbers // 2 + numbers // 64 * 4 if rounded else 2 * numbers
    assert counted == expected


def test_the_bound_by_hand():
    read = StepBytes(dense=300, experts=500, keys_values=200, disk=60)
    assert read.memory == 1000 and read.bound(memory=2000, disk=120) == 0.5 + 0.5

    def step(seconds, unique, disk):
        return Step(seconds, unique, disk // 10, disk, 40)

    rounds = [[step(1.0, [4, 4], 0), step(3.0, [4, 4], 20)], [step(4.0, [4, 6], 0)] * 2, [step(9.0, [4, 6], 0)] * 2]
    point = points_of({"batch": [2]}, BASE, "int4")["batch"][0][1]
    row = Measured(2, point, 32, "exact", read, rounds).row(memory=2000, disk=120)
    assert row["ms_per_step"] == {"median": 4e3, "min": 2e3, "max": 9e3} and row["ms_per_token"] == 2e3
    assert row["bound_ms"] == 1e3 and row["of_bound"] == {"median": 4, "min": 2, "max": 9}
    assert row["unique_experts_by_layer"] == [4, pytest.approx(16 / 3)]
    assert row["misses"] == pytest.approx(1 / 3)


def test_bytes_of_a_step_are_means(files):
    with closing((model := files.load("100%", None, quiet)).cachemoe):
        size = model.cachemoe.engine.page_format.weight_bytes
        read = step_bytes(model, [Step(1.0, [4, 6], 0, 0, 10), Step(1.0, [4, 4], 3, 30, 20)])
        assert read == StepBytes(dense_bytes(model), 9 * size, 15, 15)


def test_experts_by_chance():
    assert by_chance(60, 4, 1) == pytest.approx(4) and by_chance(4, 4, 3) == 4
    # Of 3 experts one each: two tokens agree in a third of all cases.
    assert by_chance(3, 1, 2) == pytest.approx(1 / 3 * 1 + 2 / 3 * 2)


def test_nothing_is_kept_of_a_checkpoint_that_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path))
    checkpoint = Checkpoint(TINYMOE)
    made = fingerprint(checkpoint, quiet)
    (note,) = (tmp_path / "fingerprints").iterdir()
    assert made in note.read_text()
    for _ in range(2):  # nor is it wrong to forget what is not there
        forget(checkpoint)
        assert not note.exists()


@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt])
def test_nothing_of_a_model_is_left_when_its_use_fails(error, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path))
    with pytest.raises(error), made(SHAPE, "int4", quiet) as files:
        assert files.store.exists() and (files.checkpoint / "config.json").exists()
        raise error
    assert not [each for each in tmp_path.iterdir() if "growth" in each.name]


def test_prose_is_cut_into_windows():
    text, windows = held_out_text(), prose(3, 50)
    third = len(text) // 3
    assert [bytes(each.tolist()) for each in windows] == [text[i * third :][:50] for i in range(3)]
    with pytest.raises(InputError, match="cut into 3"):
        prose(3, third + 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--axis", "width"), "unknown axis 'width': choose among context, experts"),
        (("--context", WARM_UP), f"a context of {WARM_UP} tokens is too short"),
        (("--context", 10**6), "choose a shorter context or fewer sequences"),
        (("--experts", 3), "a token cannot use 4 of 3 experts"),
        (("--layers", 0), "a model of 0 layers"),
        (("--batch", 0), "a step of 0 sequences cannot be"),
        (("--pool", "3"), "must lie between the 4 that a token uses"),
        (("--pool", "half"), "a pool is a share such as 50%"),
        (("--hidden", 60), "H a multiple of 16"),
        (("--hidden", 8192), "larger than any that is made here"),
        (("--intermediate", 40), "divisible by 32"),
        (("--format", "int3"), "unknown page format 'int3'"),
        (("--dense", "int2"), "--dense is int8, int4 or none, not 'int2'"),
        (("--tokens", 1000), "than the 2048 that the built-in models take"),
        (("--json", "."), "it is a folder"),
        (("--plot", "."), "it is a folder"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(arguments, words, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["growth", *map(str, arguments)])
    message = " ".join(result.stderr.split())
    assert result.exit_code == 2, result.output
    assert message.startswith("cachemoe: ") and words in message, message
    assert not (tmp_path / "cache").exists()
