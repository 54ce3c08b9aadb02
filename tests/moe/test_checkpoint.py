"""Reading checkpoint folders: shapes, experts as pages, and what is refused."""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_mxfp4, save_random

from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.fingerprint import fingerprint
from cachemoe.moe.models import load_model
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
    # Folders in an index are not followed: only the file's name counts.
    return {name: f"../../elsewhere/{file}" for file, members in shards.items() for name in members}


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


def test_an_index_that_names_an_absent_tensor_is_refused(folder):
    write_index(folder, shard(folder) | {"model.layers.7.absent.weight": "a.safetensors"})
    with pytest.raises(InputError, match=r"names model\.layers\.7\.absent\.weight, which a\.safetensors lacks"):
        Checkpoint(folder)


def test_pickle_is_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytest_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"pytest_model\.bin, which is pickle"):
        Checkpoint(folder)


def test_a_missing_expert_is_refused(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.7.up_proj.weight"))
    checkpoint = Checkpoint(folder)
    with pytest.raises(InputError, match=r"no tensor model\.layers\.1\.mlp\.experts\.7\.up_proj\.weight"):
        list(checkpoint.pages(checkpoint.page_format()))
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.7.down_proj.weight"))
    with pytest.raises(InputError, match="8 experts in some layers and 7 in layer 1"):
        Checkpoint(folder)


def test_an_expert_of_another_shape_is_refused(folder):
    def cut(tensors):
        name = "model.layers.1.mlp.experts.3.down_proj.weight"
        tensors[name] = tensors[name][:, :16].contiguous()

    edit_tensors(folder, cut)
    checkpoint = Checkpoint(folder)
    with pytest.raises(InputError, match=r"down of \(32, 16\) in layer 1, expert 3"):
        list(checkpoint.pages(checkpoint.page_format()))


def test_a_model_that_lacks_a_tensor_is_not_filled_with_random_numbers(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight"))
    with pytest.raises(InputError, match=r"lacks 1 of the model's tensors, .*q_proj"):
        load_model(folder)
