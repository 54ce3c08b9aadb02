"""Reading checkpoint folders: shapes, experts as pages, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.swap import load_model
from cachemoe.offload.errors import InputError


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_shape_is_the_configs(tiny_checkpoint):
    shape = Checkpoint(tiny_checkpoint).shape
    assert (shape.layers, shape.experts, shape.top_k) == ((0, 1), 8, 2)
    assert (shape.hidden, shape.intermediate, shape.vocabulary, shape.context) == (32, 32, 256, 128)


def test_dense_layers_are_no_moe_layers(folder):
    edit_config(folder, num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert Checkpoint(folder).shape.layers == (1, 5)


def test_pages_hold_the_models_experts(tiny_checkpoint):
    checkpoint, model = Checkpoint(tiny_checkpoint), load_model(tiny_checkpoint, torch.bfloat16)
    page_format = checkpoint.layout("bf16").page_format
    pages = iter(checkpoint.pages(page_format))
    for layer in model.model.layers:
        for e in range(8):
            gate_up, down = page_format.views(next(pages)).values()
            assert torch.equal(gate_up, layer.mlp.experts.gate_up_proj[e])
            assert torch.equal(down, layer.mlp.experts.down_proj[e])
    assert next(pages, None) is None


def test_a_sharded_checkpoint_gives_the_same_pages(tiny_checkpoint, folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    # Folders in an index are not followed: only the file's name counts.
    weight_map = {name: f"../../elsewhere/{file}" for file, members in shards.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole, sharded = Checkpoint(tiny_checkpoint), Checkpoint(folder)
    page_format = whole.layout("bf16").page_format
    for a, b in zip(whole.pages(page_format), sharded.pages(page_format), strict=True):
        assert torch.equal(a, b)
    assert whole.fingerprint() == sharded.fingerprint()


def test_other_experts_are_another_model(tiny_checkpoint, folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts.5.up_proj.weight"] *= 2
    save_file(tensors, folder / "model.safetensors")
    assert Checkpoint(tiny_checkpoint).fingerprint() != Checkpoint(folder).fingerprint()


def test_another_architecture_is_refused(folder):
    edit_config(folder, model_type="llama")
    with pytest.raises(InputError, match="'llama' model, and this version runs qwen2_moe"):
        Checkpoint(folder)


def test_a_config_that_lacks_a_field_is_refused(folder):
    edit_config(folder, num_experts=None)
    with pytest.raises(InputError, match="lacks 'num_experts'"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_or_damaged_files_are_refused(folder, name):
    (folder / name).write_bytes(b"{ damaged")
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        Checkpoint(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match="copy"):
        Checkpoint(folder)


def test_a_missing_expert_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.7.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    with pytest.raises(InputError, match=r"no tensor model\.layers\.1\.mlp\.experts\.7\.up_proj\.weight"):
        list(checkpoint.pages(checkpoint.layout("bf16").page_format))


def test_a_model_that_lacks_a_tensor_is_not_filled_with_random_numbers(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 of the model's tensors, .*q_proj"):
        load_model(folder)
