"""Reading checkpoint folders: shapes, experts as pages, and what is refused."""

import dataclasses
import json
import os
import shutil
import time
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_mxfp4, save_random

from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.fingerprint import fingerprint
from cachemoe.moe.models import load_model
from cachemoe.moe.tensor_names import find
from cachemoe.offload.errors import InputError


@contextmanager
def quiet(description, total):
    yield lambda: None


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder):
    """Split the folder's file in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    return {name: file for file, members in shards.items() for name in members}


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shape_is_the_configs(tiny_checkpoint):
    shape = Checkpoint(tiny_checkpoint).shape
    assert (shape.layers, shape.experts, shape.top_k) == ((0, 1), 8, 2)
    assert (shape.hidden, shape.intermediate, shape.vocabulary, shape.context) == (32, 32, 256, 128)


def test_dense_layers_are_no_moe_layers(tmp_path):
    save_random("glm4_moe", tmp_path / "model")
    assert Checkpoint(tmp_path / "model").shape.layers == (1, 2)


def test_layers_beyond_the_models_are_left_out(folder):
    """DeepSeek-V3's checkpoint has a layer more, for predicting several tokens."""
    edit_config(folder, num_hidden_layers=1)
    assert Checkpoint(folder).shape.layers == (0,)


@pytest.mark.parametrize("stem", ["mtp.", "model.mtp.", "another."])
def test_experts_that_predict_further_tokens_are_not_the_models(tiny_checkpoint, folder, stem):
    def add(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.0.mlp.experts.")]:
            tensors[name.replace("model.", stem, 1)] = torch.zeros_like(tensors[name])

    edit_tensors(folder, add)
    ours, whole = Checkpoint(folder), Checkpoint(tiny_checkpoint)
    assert ours.shape == whole.shape
    assert fingerprint(ours, quiet) == fingerprint(whole, quiet)
    assert ours.is_expert(f"{stem}layers.0.mlp.experts.3.up_proj.weight")


def test_pages_hold_the_models_experts(tiny_checkpoint):
    checkpoint, model = Checkpoint(tiny_checkpoint), load_model(tiny_checkpoint, torch.bfloat16)
    page_format = checkpoint.layout().page_format
    assert page_format.kind == "bf16"
    pages = iter(checkpoint.pages(page_format))
    for layer in model.model.layers:
        for e in range(8):
            gate_up, down = page_format.views(next(pages)).values()
            assert torch.equal(gate_up, layer.mlp.experts.gate_up_proj[e])
            assert torch.equal(down, layer.mlp.experts.down_proj[e])
    assert next(pages, None) is None


def test_mxfp4_experts_are_their_exact_values(tmp_path):
    """gpt-oss as it is published: blocks of 32 values, two a byte, with a power of two each."""
    save_random("gpt_oss", tmp_path / "model")
    expected = save_mxfp4(tmp_path / "model", tmp_path / "mxfp4")
    checkpoint = Checkpoint(tmp_path / "mxfp4")
    assert checkpoint.shape.intermediate == 64
    for e in range(8):
        weights = checkpoint.expert(1, e)
        assert torch.equal(weights["gate_up"].float(), expected["model.layers.1.mlp.experts.gate_up_proj"][e])
        assert torch.equal(weights["down"].float(), expected["model.layers.1.mlp.experts.down_proj"][e])
        assert weights["gate_up_bias"].shape == (128,)


def test_a_sharded_checkpoint_gives_the_same_pages(tiny_checkpoint, folder):
    write_index(folder, shard(folder))
    whole, sharded = Checkpoint(tiny_checkpoint), Checkpoint(folder)
    page_format = whole.layout().page_format
    for a, b in zip(whole.pages(page_format), sharded.pages(page_format), strict=True):
        assert torch.equal(a, b)
    assert fingerprint(whole, quiet) == fingerprint(sharded, quiet)


def test_other_experts_are_another_model(tiny_checkpoint, folder):
    edit_tensors(folder, lambda tensors: tensors["model.layers.1.mlp.experts.5.up_proj.weight"].mul_(2))
    assert fingerprint(Checkpoint(tiny_checkpoint), quiet) != fingerprint(Checkpoint(folder), quiet)


def test_a_model_without_experts_is_refused(folder):
    edit_config(folder, model_type="llama")
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".experts." in name])
    with pytest.raises(InputError, match=r"no MoE model, or names its experts in a way .* \(a 'llama' model\)"):
        Checkpoint(folder)


def test_a_config_that_lacks_a_field_is_refused(folder):
    edit_config(folder, num_experts_per_tok=None)
    with pytest.raises(InputError, match="does not say how many experts every token uses, as num_experts_per_tok"):
        Checkpoint(folder)
    edit_config(folder, num_experts_per_tok=[2, 2], vocab_size=None)
    with pytest.raises(InputError, match="lacks 'vocab_size'"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 9}, "9 of 8 experts"),
        ({"num_experts_per_tok": [2, 3]}, "does not say how many experts every token uses"),
        ({"hidden_act": "relu2"}, "'relu2'; cachemoe computes silu"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised by fp8"),
        ({"model_type": "gpt_oss", "swiglu_limit": 5.0}, "swiglu_limit = 5.0"),
    ],
)
def test_a_config_that_asks_for_more_is_refused(folder, changes, words):
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=words):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_or_damaged_files_are_refused(folder, name):
    (folder / name).write_bytes(b"{ damaged")
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        Checkpoint(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match="copy"):
        Checkpoint(folder)


def test_a_file_that_is_cut_short_is_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="cut short or damaged perhaps"):
        Checkpoint(folder)


def test_a_missing_shard_is_refused(folder):
    write_index(folder, shard(folder))
    (folder / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"b\.safetensors is missing"):
        Checkpoint(folder)


def test_an_index_decides_which_file_has_a_tensor(folder, tiny_checkpoint):
    """What it names beside the model's is no error; a copy in another file, or what it does not name, is none."""
    where = shard(folder)
    name = next(name for name, file in where.items() if file == "a.safetensors")
    second = load_file(folder / "b.safetensors")
    second |= {name: torch.zeros(7), "not.in.the.index": torch.zeros(7)}
    save_file(second, folder / "b.safetensors")
    write_index(folder, where | {"model.layers.7.absent.weight": "a.safetensors"})
    checkpoint = Checkpoint(folder)
    assert torch.equal(checkpoint.tensors.read(name), Checkpoint(tiny_checkpoint).tensors.read(name))
    assert "not.in.the.index" not in checkpoint.tensors
    with pytest.raises(InputError, match=r"says that .*absent\.weight is in a\.safetensors, which lacks it"):
        checkpoint.tensors.read("model.layers.7.absent.weight")


def test_a_single_file_comes_before_an_index_beside_it(folder):
    """As transformers reads them: the index may be an older model's, saved into the same folder."""
    new = load_file(folder / "model.safetensors")
    write_index(folder, shard(folder))
    checkpoint = Checkpoint(folder)
    save_file({name: tensor / 2 for name, tensor in new.items()}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors has changed while it was in use"):
        checkpoint.check_unchanged()
    tensors = Checkpoint(folder).tensors
    assert all(torch.equal(tensors.read(name), tensor / 2) for name, tensor in new.items())


def test_files_in_folders_below_are_read_and_none_elsewhere(folder, tiny_checkpoint):
    where = shard(folder)
    (folder / "below").mkdir()
    (folder / "b.safetensors").rename(folder / "below" / "b.safetensors")
    write_index(folder, {name: file if file[0] == "a" else f"below/{file}" for name, file in where.items()})
    assert fingerprint(Checkpoint(folder), quiet) == fingerprint(Checkpoint(tiny_checkpoint), quiet)
    for file in ("../copy/a.safetensors", str(folder / "a.safetensors"), "below/../a.safetensors", "", "a\0b"):
        write_index(folder, dict.fromkeys(where, file))
        with pytest.raises(InputError, match="which is not in its folder"):
            Checkpoint(folder)


@pytest.mark.parametrize(
    "index", [b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b"[" * 100_000]
)
def test_a_damaged_index_is_refused(folder, index):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(InputError, match=r"index\.json"):
        Checkpoint(folder)


def test_a_fifo_is_not_waited_for(folder):
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(InputError, match=name):
            Checkpoint(folder)


def test_pickle_is_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytest_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"pytest_model\.bin, which is pickle"):
        Checkpoint(folder)


def test_a_missing_expert_is_refused(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.7.up_proj.weight"))
    with pytest.raises(InputError, match=r"no tensor model\.layers\.1\.mlp\.experts\.7\.up_proj\.weight"):
        Checkpoint(folder)
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.7.down_proj.weight"))
    with pytest.raises(InputError, match="8 experts in some layers and 7 in layer 1"):
        Checkpoint(folder)


@pytest.mark.parametrize("part", ["gate", "up", "down"])
@pytest.mark.parametrize(
    "change", [lambda w: w[:, :16], lambda w: w[:16], lambda w: w[None], lambda w: w[:0], torch.Tensor.half]
)
def test_an_expert_of_another_shape_or_dtype_is_refused(folder, part, change):
    name = f"model.layers.1.mlp.experts.3.{part}_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))
    with pytest.raises(InputError, match=rf"{name} of \(.*\) in torch\..*, where the model's experts need \(32, 32\)"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("model", "name", "change"),
    [
        ("granitemoe", "model.layers.1.block_sparse_moe.input_linear.weight", lambda w: w[:4]),
        ("granitemoe", "model.layers.1.block_sparse_moe.output_linear.weight", lambda w: w.flatten()),
        ("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj", lambda w: w.mT),
        ("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj_bias", lambda w: w[:, :1]),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj_bias", lambda w: w[:1]),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj_bias", None),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj_bias", None),
        ("mxfp4", "model.layers.1.mlp.experts.down_proj_scales", lambda w: w[..., :1]),
        ("mxfp4", "model.layers.1.mlp.experts.gate_up_proj_blocks", lambda w: w.view(torch.int8)),
        ("mxfp4", "model.layers.1.mlp.experts.gate_up_proj_scales", None),
    ],
)
def test_all_experts_in_one_tensor_have_its_shape_in_every_layer(tmp_path, model, name, change):
    save_random("gpt_oss" if model == "mxfp4" else model, tmp_path / "model")
    folder = tmp_path / "model"
    if model == "mxfp4":
        folder = tmp_path / "mxfp4"
        save_mxfp4(tmp_path / "model", folder)

    def edit(tensors):
        weight = tensors.pop(name)
        if change is not None:
            tensors[name] = change(weight).contiguous()

    edit_tensors(folder, edit)
    with pytest.raises(InputError, match=r"where the model's experts need|no tensor"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text_config", 5),
        ("quantization_config", "x"),
        ("model_type", []),
        ("hidden_act", {"a": 1}),
        ("num_hidden_layers", "8"),
        ("num_hidden_layers", True),
        ("vocab_size", 2.5),
        ("max_position_embeddings", "128"),
        ("num_experts_per_tok", {"a": 1}),
        ("num_experts_per_tok", [[2], [2]]),
        ("num_experts_per_tok", []),
    ],
)
def test_a_config_of_wrong_types_is_refused(folder, field, value):
    edit_config(folder, **{field: value})
    with pytest.raises(InputError, match="config"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "field", ["num_hidden_layers", "max_position_embeddings", "model_type", "hidden_act", "text_config", "num_experts"]
)
def test_a_field_that_is_null_is_as_one_that_is_absent(folder, field):
    shape = Checkpoint(folder).shape
    (folder / "config.json").write_text(json.dumps(Checkpoint(folder).config | {field: None}))
    expected = dataclasses.replace(shape, context=None) if field == "max_position_embeddings" else shape
    assert Checkpoint(folder).shape == expected


def test_a_null_of_the_text_part_hides_nothing(folder):
    shape = Checkpoint(folder).shape
    edit_config(folder, text_config={"num_hidden_layers": None, "vocab_size": None})
    assert Checkpoint(folder).shape == shape


@pytest.mark.parametrize("field", ["num_experts", "hidden_size"])
@pytest.mark.parametrize("size", [1, 7, 64, 10**400])
def test_sizes_that_are_not_the_tensors_are_refused(folder, field, size):
    edit_config(folder, **{field: size})
    with pytest.raises(InputError, match=rf"config\.json has {field} = .* and the experts in its files have") as caught:
        Checkpoint(folder)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_file_of_json_beyond_all_size_is_not_read(folder, name):
    (folder / "model.safetensors").unlink()
    with open(folder / name, "wb") as file:
        file.truncate(50_000_001)
    with pytest.raises(InputError, match=f"{name} cannot be read.* no more than 50000000"):
        Checkpoint(folder)


def test_an_index_of_one_endless_name_is_said_briefly(folder):
    (folder / "model.safetensors").unlink()
    write_index(folder, {"a": "/" + "x" * 100_000})
    with pytest.raises(InputError, match="which is not in its folder") as caught:
        Checkpoint(folder)
    assert len(str(caught.value)) < 500


def test_experts_of_a_dtype_that_no_page_has_are_refused_at_once(folder):
    """``info`` refuses them as ``load`` does."""
    edit_tensors(folder, lambda tensors: tensors.update({n: t.double() for n, t in tensors.items() if "experts" in n}))
    with pytest.raises(InputError, match=r"the experts are in torch\.float64"):
        Checkpoint(folder)


def test_biases_that_are_no_floats_are_refused(tmp_path):
    save_random("gpt_oss", tmp_path / "own", torch.float32)

    def edit(tensors):
        for layer in range(3):
            name = f"model.layers.{layer}.mlp.experts.gate_up_proj_bias"
            tensors[name] = tensors[name].int()

    edit_tensors(tmp_path / "own", edit)
    with pytest.raises(InputError, match=r"gate_up_proj_bias of .* in torch\.int32, where .* in torch\.float32"):
        Checkpoint(tmp_path / "own")


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"[]", b"\xff", b'{"vocab_size": ' + b"9" * 5000 + b"}", b'{"a": 1, "a": 2}']
)
def test_a_config_that_is_none_is_refused(folder, text):
    (folder / "config.json").write_bytes(text)
    with pytest.raises(InputError, match=r"config\.json"):
        Checkpoint(folder)


def test_a_name_of_any_length_is_read(folder):
    shape = Checkpoint(folder).shape
    edit_tensors(folder, lambda tensors: tensors.update({"layers.1." * 50_000: torch.zeros(0)}))
    assert Checkpoint(folder).shape == shape


@pytest.mark.parametrize("layer, e", [("9" * 5000, "0"), ("1", "9" * 5000), ("9" * 7, "0")])
def test_a_layer_or_expert_of_a_number_that_cannot_be_is_refused(folder, layer, e):
    name = f"model.layers.{layer}.mlp.experts.{e}.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(0)}))
    with pytest.raises(InputError, match="of a number that cannot be") as caught:
        Checkpoint(folder)
    assert len(str(caught.value)) < 500


def copies(tensors, old, new):
    """Every expert's tensor once more, under another name."""
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name.replace(old, new, 1)] = torch.zeros_like(tensors[name])


@pytest.mark.parametrize(
    ("model", "change", "said"),
    [
        ("mixtral", lambda t: copies(t, ".block_sparse_moe.", ".other."), r"two sets of experts in layer \d"),
        ("mixtral", lambda t: copies(t, "model.", "tower."), r"experts of two models, model\..* tower\..* in 3 layers"),
        (
            "mixtral",
            lambda t: t.update({"model.layers.1.block_sparse_moe.experts.3.w1.bias": torch.ones(32)}),
            r"3\.w1\.bias among",
        ),
        (
            "mixtral",
            lambda t: t.update({"model.layers.1.block_sparse_moe.experts.03.w1.weight": torch.ones(32, 32)}),
            r"03\.w1.* among",
        ),
        (
            "mixtral",
            lambda t: t.update({"model.layers.1.block_sparse_moe.experts.down_proj": torch.ones(8, 32, 32)}),
            r"down_proj among",
        ),
        ("gpt_oss", lambda t: t.update({"model.layers.1.mlp.experts.scale": torch.ones(8)}), r"experts\.scale among"),
        (
            "granitemoe",
            lambda t: t.update({"model.layers.1.block_sparse_moe.input_linear.bias": torch.ones(8)}),
            "among",
        ),
    ],
)
def test_experts_weights_that_would_be_left_out_are_refused(tmp_path, model, change, said):
    """What no page has no product would have: the numbers would be another model's."""
    save_random(model, tmp_path / "model")
    edit_tensors(tmp_path / "model", change)
    with pytest.raises(InputError, match=said):
        Checkpoint(tmp_path / "model")


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
def test_biases_of_one_matrix_alone_are_refused(tmp_path, part):
    save_random("gpt_oss", tmp_path / "model")
    lost = f"{part}_bias"
    edit_tensors(tmp_path / "model", lambda t: [t.pop(name) for name in list(t) if name.endswith(lost)])
    with pytest.raises(InputError, match=rf"no tensor .*\.{lost}"):
        Checkpoint(tmp_path / "model")


def test_a_layer_01_is_not_layer_1(folder):
    """transformers, too, takes no name but the one that it would write."""
    shape = Checkpoint(folder).shape
    edit_tensors(folder, lambda tensors: copies(tensors, "layers.1.", "layers.01."))
    assert Checkpoint(folder).shape == shape


def test_mxfp4_experts_of_a_width_that_blocks_cannot_have_are_refused(tmp_path):
    save_random("gpt_oss", tmp_path / "model")
    save_mxfp4(tmp_path / "model", tmp_path / "mxfp4")

    def narrow(tensors):
        for name in [name for name in tensors if ".experts." in name and "down_proj" in name]:
            tensors[name] = tensors[name][:, :-8].contiguous()

    edit_tensors(tmp_path / "mxfp4", narrow)
    with pytest.raises(InputError, match="H = 24, which is no multiple of 32"):
        Checkpoint(tmp_path / "mxfp4")


@pytest.mark.parametrize("model", ["gpt_oss", "mxfp4", "mixtral", "granitemoe"])
def test_every_tensor_of_an_expert_is_known_for_one(tmp_path, model):
    """Others are loaded into the model, whose experts have no place for them."""
    folder = tmp_path / "model"
    save_random("gpt_oss" if model == "mxfp4" else model, folder)
    if model == "mxfp4":
        save_mxfp4(folder, folder := tmp_path / "mxfp4")
    checkpoint = Checkpoint(folder)
    inside = (".experts.", "input_linear", "output_linear")
    for name in checkpoint.tensors.entries:
        assert checkpoint.is_expert(name) == any(part in name for part in inside)


@pytest.mark.parametrize("part", ["experts.{}.down_proj.weight", "experts.down_proj"])
@pytest.mark.parametrize("repeated", ["layers.1.", "layers.", "9", "."])
def test_taking_a_name_apart_reads_it_once(part, repeated):
    began = time.perf_counter()
    for end in ("", ".experts.down_proj", ".experts.0.down_proj.weight"):
        find(repeated * (3_000_000 // len(repeated)) + end, part)
    assert time.perf_counter() - began < 10  # what is quadratic takes hours


@pytest.mark.parametrize(
    ("name", "part", "found"),
    [
        (
            "model.layers.3.mlp.experts.7.up_proj.weight",
            "experts.{}.up_proj.weight",
            ("model.layers.3.mlp.", "model.", 3),
        ),
        ("layers.3.experts.down_proj", "experts.down_proj", ("layers.3.", "", 3)),
        ("layers.1.x.layers.2.experts.down_proj", "experts.down_proj", ("layers.1.x.layers.2.", "layers.1.x.", 2)),
        ("players.3.experts.down_proj", "experts.down_proj", None),
        ("model.layers.3.shared_experts.down_proj", "experts.down_proj", None),
        ("model.layers.x.experts.down_proj", "experts.down_proj", None),
        ("model.layers.3.experts.down_proj.more", "experts.down_proj", None),
        ("model.layers.3.experts.seven.up_proj.weight", "experts.{}.up_proj.weight", None),
        ("model.layers.9999999999.experts.7.up_proj.weight", "experts.{}.up_proj.weight", None),
        ("model.layers.03.experts.7.up_proj.weight", "experts.{}.up_proj.weight", None),
        ("model.layers.3.experts.07.up_proj.weight", "experts.{}.up_proj.weight", None),
        ("model.layers.0.experts.0.up_proj.weight", "experts.{}.up_proj.weight", ("model.layers.0.", "model.", 0)),
        ("model.layers.3.experts.9999999999.up_proj.weight", "experts.{}.up_proj.weight", None),
    ],
)
def test_names_are_taken_apart(name, part, found):
    taken = find(name, part)
    assert found == (taken and (taken.prefix, taken.stem, taken.layer))


def test_a_model_that_lacks_a_tensor_is_not_filled_with_random_numbers(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight"))
    with pytest.raises(InputError, match=r"lacks 1 of the model's tensors, .*q_proj"):
        load_model(folder)
