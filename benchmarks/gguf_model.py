"""A checkpoint as a GGUF file in Q4_0, for llama.cpp to run beside cachemoe's int4.

The names, the file format and the rounding are the ``gguf`` library's. Experts are read one at a time.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.pack import stored_path
from cachemoe.moe.progress import Progress
from cachemoe.offload.errors import InputError
from cachemoe.offload.files import whole_file

ARCHITECTURES = {"qwen3_moe": "QWEN3MOE", "qwen2_moe": "QWEN2MOE"}  # whose weights llama.cpp takes as they are
VERSION = 2  # of what is written of a checkpoint: files of before are not taken
BLOCK = 32  # columns that share a scale in Q4_0
EXPERTS = "gate", "up", "down"


@dataclass(frozen=True)
class _Tensor:
    """Of one name in the file: its shape, whether it is in Q4_0, and what reads it."""

    size: tuple[int, ...]
    quantised: bool
    read: Callable[[], torch.Tensor]


def gguf_of(checkpoint: Checkpoint, progress: Progress) -> Path:
    """The checkpoint's GGUF in the cache directory, made if it is not there or the checkpoint has changed since.

    Raises:
        InputError: as ``write_gguf``.
    """
    stamp = hashlib.sha256(repr(checkpoint.stamp).encode()).hexdigest()[:16]
    path = stored_path(checkpoint, f"q4_0-v{VERSION}-{stamp}").with_suffix(".gguf")
    if not path.exists():
        write_gguf(checkpoint, path, progress)
    return path


def write_gguf(checkpoint: Checkpoint, path: Path, progress: Progress) -> None:
    """Write matrices in Q4_0, and vectors and routers in float32; bytes are the tokens.

    Raises:
        InputError: for an architecture or sizes that cannot be written so.
        OSError: if the file cannot be written.
    """
    import gguf

    config, shape = checkpoint.config, checkpoint.shape
    if (kind := config.get("model_type")) not in ARCHITECTURES:
        raise InputError(f"no GGUF is made of {kind} here, but of {' and '.join(ARCHITECTURES)}")
    if shape.hidden % BLOCK or shape.intermediate % BLOCK:
        sizes = f"{shape.hidden} and {shape.intermediate}"
        raise InputError(f"Q4_0 needs sizes that {BLOCK} divides, and the model has {sizes}")
    arch = gguf.MODEL_ARCH[ARCHITECTURES[kind]]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    with whole_file(path) as beside:
        writer = gguf.GGUFWriter(beside, gguf.MODEL_ARCH_NAMES[arch])
        _describe(writer, config)
        _add_tokens(writer, shape.vocabulary)
        tensors = dict(_tensors(checkpoint, names))
        for name, tensor in tensors.items():
            size, kind = tensor.size, np.dtype(np.float32)
            if tensor.quantised:
                size, kind = gguf.quant_shape_to_byte_shape(size, gguf.GGMLQuantizationType.Q4_0), np.dtype(np.uint8)
            stored = gguf.GGMLQuantizationType.Q4_0 if tensor.quantised else gguf.GGMLQuantizationType.F32
            writer.add_tensor_info(name, size, kind, math.prod(size) * kind.itemsize, stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress(f"writing {len(tensors)} tensors as GGUF", len(tensors)) as advance:
            for tensor in tensors.values():
                numbers = tensor.read().float().numpy()
                if tensor.quantised:
                    numbers = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q4_0)
                writer.write_tensor_data(numbers)
                advance()
        writer.close()


def _tensors(checkpoint: Checkpoint, names) -> Iterator[tuple[str, _Tensor]]:
    """Every tensor of the model, those of a layer's experts as three of ``[E, rows, columns]``."""
    shape, tensors = checkpoint.shape, checkpoint.tensors
    for name, entry in tensors.entries.items():
        if not checkpoint.is_expert(name):
            called = names.get_name(name, (".weight", ".bias"))
            if called is None:
                raise InputError(f"GGUF has no name for {name}")
            matrix = len(entry.shape) == 2 and "gate_inp" not in called and entry.shape[1] % BLOCK == 0
            yield called, _Tensor(tuple(entry.shape), matrix, partial(tensors.read, name))
    sizes = {"gate": (shape.intermediate, shape.hidden), "down": (shape.hidden, shape.intermediate)}
    sizes["up"] = sizes["gate"]
    for number, layer in enumerate(shape.layers):
        for part, size in sizes.items():
            called = f"blk.{layer}.ffn_{part}_exps.weight"
            yield called, _Tensor((shape.experts, *size), True, partial(_experts, checkpoint, number, part))


def _experts(checkpoint: Checkpoint, layer: int, part: str) -> torch.Tensor:
    """``[E, rows, columns]``, one matrix of each of the layer's experts."""
    matrices = []
    for e in range(checkpoint.shape.experts):
        expert = checkpoint.expert(layer, e)
        matrices.append(dict(zip(("gate", "up"), expert["gate_up"].chunk(2), strict=True), down=expert["down"])[part])
    return torch.stack(matrices)


def _describe(writer, config: dict) -> None:
    """What llama.cpp has to know of the model, from the fields of its config."""
    heads = config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    # One more: llama.cpp refuses a prompt that fills the context, since it wants room for the answer's token.
    writer.add_context_length(config["max_position_embeddings"] + 1)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    head = config.get("head_dim", config["hidden_size"] // heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_freq_base((config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta", 1e4)))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if shared := config.get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(shared)


def _add_tokens(writer, vocabulary: int) -> None:
    """A token a byte, as a byte-level BPE without merges writes them; what is beyond is never made."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    written = bytes_to_unicode()
    tokens = [written[i] if i < 256 else f"<unused{i}>" for i in range(vocabulary)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges([f"{written[32]} {written[32]}"])  # llama.cpp wants some
