"""Random models of many architectures, small enough to save and load in a moment."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import transformers
from safetensors.torch import load_file, save_file

from cachemoe.kernels.quantize import FP4_VALUES

VOCABULARY = 96
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EIGHT = {"num_experts": 8, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}


@dataclass(frozen=True)
class Tiny:
    """A model type, and what its config differs in from ``COMMON``."""

    model_type: str
    config: dict = field(default_factory=dict)


MODELS = {
    "qwen2_moe": Tiny(
        "qwen2_moe",
        EIGHT | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "norm_topk_prob": False},
    ),
    "qwen3_moe": Tiny("qwen3_moe", EIGHT | {"moe_intermediate_size": 32, "head_dim": 8, "norm_topk_prob": True}),
    "olmoe": Tiny("olmoe", EIGHT | {"intermediate_size": 32}),
    "mixtral": Tiny("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64}),
    "deepseek_v2": Tiny("deepseek_v2", LATENT | {"topk_method": "greedy", "head_dim": 8}),
    "deepseek_v2 in groups": Tiny("deepseek_v2", LATENT | {"topk_method": "group_limited_greedy", "head_dim": 8}),
    "deepseek_v3": Tiny("deepseek_v3", LATENT | {"norm_topk_prob": True}),
    "phimoe": Tiny("phimoe", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64}),
    "gpt_oss": Tiny(
        "gpt_oss",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 64,
            "head_dim": 8,
            "sliding_window": 16,
        },
    ),
    "granitemoe": Tiny("granitemoe", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64}),
    # No code names these.
    "glm4_moe": Tiny(
        "glm4_moe",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "intermediate_size": 48,
            "first_k_dense_replace": 1,
            "head_dim": 8,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "minimax_m2": Tiny(
        "minimax_m2", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32, "head_dim": 8}
    ),
    "ernie4_5_moe": Tiny(
        "ernie4_5_moe",
        {
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "intermediate_size": 48,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "hunyuan_v1_moe": Tiny("hunyuan_v1_moe", {"num_experts": 8, "moe_topk": 2, "intermediate_size": 32, "head_dim": 8}),
    "lfm2_moe": Tiny(
        "lfm2_moe",
        EIGHT
        | {
            "layer_types": ["conv", "full_attention", "full_attention"],
            "moe_intermediate_size": 32,
            "intermediate_size": 48,
            "num_dense_layers": 1,
        },
    ),
    "dots1": Tiny(
        "dots1",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "intermediate_size": 48,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
        },
    ),
    "flex_olmo": Tiny("flex_olmo", EIGHT | {"intermediate_size": 32}),
}


def save_random(name: str, folder, dtype: torch.dtype = torch.float32, **options) -> None:
    """Save a random model of ``MODELS`` as a checkpoint of that dtype."""
    tiny = MODELS[name]
    config = transformers.AutoConfig.for_model(tiny.model_type, **COMMON | tiny.config)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if key.endswith(
            ("gate.weight", "router.weight", "wg.weight")
        ):  # which transformers starts at zero: all would tie
            torch.nn.init.normal_(tensor, std=0.3)
        elif key.endswith(("e_score_correction_bias", "expert_bias", "router.bias")):
            torch.nn.init.normal_(tensor, std=0.05)
        elif tensor.dim() >= 2 and tensor.is_floating_point() and "embed" not in key:
            torch.nn.init.normal_(tensor, std=0.15)
    model.to(dtype).save_pretrained(folder, **options)


def save_mxfp4(source, folder) -> dict[str, torch.Tensor]:
    """A copy of a gpt-oss checkpoint with random mxfp4 experts, as gpt-oss is published.

    Returns:
        By the name of the parameter, ``[E, rows, columns]`` float32 of what its blocks stand for.
    """
    shutil.copytree(source, folder)
    file, generator, expected = folder / "model.safetensors", torch.Generator().manual_seed(0), {}
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        codes = torch.randint(0, 16, (experts, rows, columns // 32, 32), generator=generator)
        scales = torch.randint(121, 125, (experts, rows, columns // 32), generator=generator)
        tensors[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        tensors[f"{name}_scales"] = scales.to(torch.uint8)
        expected[name] = (torch.tensor(FP4_VALUES)[codes] * 2.0 ** (scales[..., None] - 127)).flatten(2)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


@contextmanager
def silently(description, total):
    yield lambda: None


def calibration_of_model(model, source, windows, fingerprint, name):
    """What ``cachemoe calibrate`` makes, of a model in memory and its checkpoint."""
    from cachemoe.moe.calibrate import calibrate
    from cachemoe.moe.leveled import cheaper_format, open_leveled

    own, shape = source.page_format(None), source.shape
    formats = [own, cheaper_format(source, own)]
    with open_leveled(source, formats, [shape.experts] * len(shape.layers), silently) as leveled:
        return calibrate(model, source, formats, leveled, windows, fingerprint, name, silently)
