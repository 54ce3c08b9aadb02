"""Which of transformers' models a checkpoint is, and what is said where it is none: before anything is packed."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, save_random

from cachemoe.moe.checkpoint import TINYMOE, Checkpoint
from cachemoe.moe.load import check_loadable, load
from cachemoe.moe.models import load_model, load_tokenizer, load_without_experts, outline
from cachemoe.offload.errors import InputError

transformers = pytest.importorskip("transformers")
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 48,
    "shared_expert_intermediate_size": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_local_experts": 8,
    "intermediate_size_mlp": 48,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
PROMPT = torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    save_random("qwen3_moe", folder)
    return folder


@pytest.fixture
def copy(qwen3, tmp_path):
    return shutil.copytree(qwen3, tmp_path / "copy")


def saved(folder, auto, config):
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    return folder


def seeing(name):
    fields = {"qwen3_5_moe": transformers.Qwen3_5MoeConfig, "qwen3_vl_moe": transformers.Qwen3VLMoeConfig}
    # Every fourth layer of Qwen3.5 has the attention that its cache counts tokens by.
    return fields[name](text_config=TEXT | {"num_hidden_layers": 4}, vision_config=VISION)


@pytest.mark.parametrize(
    ("name", "own"),
    [("qwen3_5_moe", "AutoModelForCausalLM"), ("qwen3_vl_moe", "AutoModelForImageTextToText")],
)
def test_a_model_that_sees_is_the_class_that_transformers_takes(name, own, tmp_path):
    """The class for text alone where there is one, though the checkpoint is the whole's; else the whole."""
    folder = saved(tmp_path / "model", transformers.AutoModelForImageTextToText, seeing(name))
    expected = getattr(transformers, own).from_pretrained(folder).eval()
    check_loadable(Checkpoint(folder))
    for model in (load(folder, device="cpu")[0], load_model(folder)):
        assert type(model) is type(expected)
        with torch.inference_mode():
            torch.testing.assert_close(model(input_ids=PROMPT).logits, expected(input_ids=PROMPT).logits)


def test_matrices_stored_as_the_hub_has_them_are_read_as_transformers_reads_them(tmp_path):
    """Qwen3-VL-MoE is published with ``[in, out]`` and saved by transformers with ``[out, in]``."""
    folder = saved(tmp_path / "model", transformers.AutoModelForImageTextToText, seeing("qwen3_vl_moe"))
    expected = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    file = folder / "model.safetensors"
    turned = {name: t.mT.contiguous() if ".experts." in name else t for name, t in load_file(file).items()}
    save_file(turned, file, metadata={"format": "pt"})
    with torch.inference_mode():
        logits = load(folder, device="cpu")[0](input_ids=PROMPT).logits
        torch.testing.assert_close(logits, expected(input_ids=PROMPT).logits)


def test_an_outline_is_the_model_without_its_weights(qwen3):
    model, own = outline(Checkpoint(qwen3)), load_without_experts(Checkpoint(qwen3))
    for (name, parameter), (_, expected) in zip(model.named_parameters(), own.named_parameters(), strict=True):
        assert (parameter.shape, parameter.dtype) == (expected.shape, expected.dtype), name
        assert parameter.is_meta or parameter.untyped_storage().nbytes() == parameter.element_size(), name


def test_the_dtype_is_the_configs_else_that_of_most_bytes(tmp_path):
    save_random("qwen3_moe", tmp_path / "model", torch.bfloat16)
    file, config = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"
    tensors = load_file(file)
    first = sorted(tensors)[0]
    tensors[first] = tensors[first].float()
    save_file(tensors, file, metadata={"format": "pt"})
    assert load_without_experts(Checkpoint(config.parent)).dtype == torch.bfloat16
    fields = {name: value for name, value in json.loads(config.read_text()).items() if "dtype" not in name}
    config.write_text(json.dumps(fields))
    with torch.device("cpu"):
        torch.set_default_dtype(torch.float64)
        try:
            model = load_without_experts(Checkpoint(config.parent))
        finally:
            torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def refused(words, folder):
    """By load, and by what looks before it, with nothing packed."""
    with pytest.raises(InputError, match=words) as caught:
        check_loadable(Checkpoint(folder))
    assert "get it again" not in str(caught.value)
    with pytest.raises(InputError, match=words):
        load(folder)


def test_experts_outside_the_interface_are_named_as_the_cause(tmp_path, cache):
    llama = transformers.AutoConfig.for_model("llama4_text", **TEXT)
    folder = saved(tmp_path / "llama", transformers.AutoModelForCausalLM, llama)
    refused("Llama4ForCausalLM has no experts that go through transformers' experts interface", folder)
    fields = dict(TEXT, num_layers=2, ffn_hidden_size=64, expert_ffn_hidden_size=32, n_routed_experts=8, moe_topk=3)
    latent = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    longcat = transformers.LongcatFlashConfig(**fields | latent | {"num_key_value_heads": 4})
    folder = saved(tmp_path / "longcat", transformers.AutoModelForCausalLM, longcat)
    refused("LongcatFlashForCausalLM has no experts that go through transformers' experts interface", folder)
    assert not list(cache.glob("*.safetensors"))


def test_another_head_is_named_as_the_cause(tmp_path):
    config = transformers.AutoConfig.for_model("qwen3_moe", **TEXT, num_labels=1)
    refused(
        r"has a Qwen3MoeForSequenceClassification, which lacks a language model's head, lm_head\.weight",
        saved(tmp_path / "model", transformers.AutoModelForSequenceClassification, config),
    )


def test_a_type_that_is_no_language_model_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "clip", "architectures": ["CLIPModel"]}))
    refused("has a CLIPConfig, for which transformers has no language model", copy)
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "not-yet-known"}))
    refused("transformers cannot load .*not-yet-known", copy)


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(copy):
    name, file = "model.layers.1.self_attn.o_proj.weight", copy / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: torch.zeros(32, 16)}, file, metadata={"format": "pt"})
    refused(rf"{name} of \(32, 16\), where a Qwen3MoeForCausalLM of its config has \(32, 32\)", copy)
    with pytest.raises(InputError, match=rf"{name} of \(32, 16\)"):
        load_model(copy)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    refused(f"lacks 1 of the model's tensors, {name} first", copy)


@pytest.mark.parametrize("text", ["{", "[]", '{"transformers_version": 5, "eos_token_id": {}'])
def test_a_damaged_generation_config_is_one_sentence(copy, text):
    (copy / "generation_config.json").write_text(text)
    refused("transformers cannot load", copy)


def some_tokenizer(folder):
    (folder / "tokenizer.model").write_bytes(b"needs a library or code that is not here")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Some", "auto_map": {"AutoTokenizer": ["tokenization_some.Some", None]}})
    )


def no_vocabulary(folder):
    (folder / "tokenizer_config.json").write_text("{}")


def not_json(folder):
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("make", [some_tokenizer, no_vocabulary, not_json])
def test_a_tokenizer_that_cannot_be_had_is_a_warning(copy, make):
    make(copy)
    with pytest.raises(InputError, match="transformers cannot load the tokenizer of") as caught:
        load_tokenizer(copy)
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match="cannot load the tokenizer of .*; the model is loaded without"):
        model, tokenizer = load(copy, device="cpu")
    assert tokenizer is None
    with torch.inference_mode():
        torch.testing.assert_close(model(PROMPT).logits, load_model(copy)(PROMPT).logits)


def test_a_folder_without_a_tokenizer_gives_none(qwen3):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_tokenizer(qwen3) is None
        assert load_tokenizer(TINYMOE)("é").input_ids == list("é".encode())
