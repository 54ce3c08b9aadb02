"""A checkpoint of any size with random weights: to see that a model larger than memory runs, without downloading one.

cachemoe synthetic FOLDER --gigabytes 3.2
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save

from cachemoe.moe.checkpoint import TINYMOE
from cachemoe.moe.progress import Progress
from cachemoe.moe.shape import MoeShape
from cachemoe.offload.errors import InputError
from cachemoe.offload.files import whole_file

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, HEADS, VOCABULARY, CONTEXT = 32, 4, 1024, 1024, 8, 256, 2048
STD = 0.02
MOST_GIGABYTES = 1e6
LAYER_BYTES = 2 * EXPERTS * 3 * HIDDEN * INTERMEDIATE
NOISE = 1 << 24  # numbers drawn; tensors are stretches of them, since drawing all would take minutes


def write_synthetic(folder: Path, gigabytes: float, progress: Progress) -> None:
    """Write a random bfloat16 Qwen3-MoE of at least that size: layers of 32 experts of 6.3 MB each, byte-level.

    Args:
        folder: made if it is not there.
        gigabytes: decimal, of all weights.

    Raises:
        InputError: for a size that cannot be.
        OSError: if it cannot be written.
    """
    if not 0 <= gigabytes < MOST_GIGABYTES:
        raise InputError(f"a checkpoint of {gigabytes} GB cannot be made: choose less than {MOST_GIGABYTES:.0f}")
    layers = max(1, -(-int(gigabytes * 1e9) // LAYER_BYTES))
    shape = MoeShape(tuple(range(layers)), EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, VOCABULARY, CONTEXT)
    write_model(folder, shape, progress)


def check_shape(shape: MoeShape) -> None:
    """Whether a model of that shape can be written.

    Raises:
        InputError: if not.
    """
    hidden, intermediate = shape.hidden, shape.intermediate
    if min(len(shape.layers), hidden, intermediate) < 1 or hidden % (2 * HEADS):
        raise InputError(
            f"a model of {len(shape.layers)} layers with H = {hidden} and I = {intermediate} cannot be made: it needs "
            f"a layer at least, H a multiple of {2 * HEADS}, for its {HEADS} heads, and I positive"
        )
    if hidden * max(hidden, intermediate, shape.experts) >= NOISE:
        raise InputError(
            f"H = {hidden}, I = {intermediate} and {shape.experts} experts make a matrix of {NOISE} numbers or more, "
            "which is larger than any that is made here: choose less"
        )
    if not 1 <= shape.top_k <= shape.experts:
        raise InputError(f"a token cannot use {shape.top_k} of {shape.experts} experts: choose more experts")


def write_model(folder: Path, shape: MoeShape, progress: Progress) -> None:
    """Write a random bfloat16 Qwen3-MoE of a given shape, byte-level, every layer of it an MoE layer.

    Args:
        folder: made if it is not there.
        shape: its layers count from 0, its vocabulary is 256.

    Raises:
        InputError: for a shape that cannot be.
        OSError: if it cannot be written.
    """
    check_shape(shape)
    layers, hidden = len(shape.layers), shape.hidden
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": shape.intermediate,
        "moe_intermediate_size": shape.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": hidden // HEADS,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": True,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    for name in ("tokenizer.json", "tokenizer_config.json"):  # the vocabulary is tinymoe's: bytes
        shutil.copy(TINYMOE / name, folder)
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)).mul_(STD).bfloat16()
    draws = iter(range(1 << 62))

    def weight(*shape: int) -> torch.Tensor:
        size = torch.Size(shape).numel()
        return noise[next(draws) * 7919 % (NOISE - size) :][:size].view(shape).clone()

    def parts() -> Iterator[dict[str, torch.Tensor]]:
        # Tokens so far apart that the layers do not level them: each has its own experts, and text decides who is used.
        embedding = weight(VOCABULARY, hidden) / STD
        ends = {"model.embed_tokens.weight": embedding, "lm_head.weight": weight(VOCABULARY, hidden)}
        yield ends | {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
        for layer in range(layers):
            yield {f"model.layers.{layer}.{name}": tensor for name, tensor in _layer(shape, weight)}

    weight_map = {}
    with progress(f"writing {layers} layers", layers + 1) as advance:
        for number, tensors in enumerate(parts()):
            file = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
            with whole_file(folder / file) as partial:
                partial.write_bytes(save(tensors, metadata={"format": "pt"}))
            weight_map |= dict.fromkeys(tensors, file)
            advance()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _layer(shape: MoeShape, weight: Callable[..., torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    hidden, intermediate = shape.hidden, shape.intermediate
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    yield from ((f"{name}.weight", ones.clone()) for name in ("input_layernorm", "post_attention_layernorm"))
    yield from ((f"self_attn.{name}_proj.weight", weight(hidden, hidden)) for name in "qkvo")
    yield from ((f"self_attn.{name}_norm.weight", ones[: hidden // HEADS].clone()) for name in "qk")
    yield "mlp.gate.weight", weight(shape.experts, hidden) / STD * hidden**-0.5  # logits of standard deviation 1
    for e in range(shape.experts):
        for name, size in (
            ("gate", (intermediate, hidden)),
            ("up", (intermediate, hidden)),
            ("down", (hidden, intermediate)),
        ):
            yield f"mlp.experts.{e}.{name}_proj.weight", weight(*size)
