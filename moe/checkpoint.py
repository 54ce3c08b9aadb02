"""Hugging Face checkpoints on disk: what the MoE layers are, and their experts one at a time, as pages."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cachemoe.kernels.formats import PageFormat
from cachemoe.offload.errors import InputError
from cachemoe.offload.store import StoreLayout

TINYMOE = Path(__file__).parent / "tinymoe"
MODEL_TYPES = ("qwen2_moe",)


@dataclass(frozen=True)
class MoeShape:
    """Dimensions of a model's MoE layers.

    Args:
        layers: decoder layers that are MoE layers, in order.
        experts: E. top_k: K. hidden: H. intermediate: I of an expert. vocabulary: tokens.
        context: longest sequence the model takes.
        renormalise: whether the K gate weights are scaled to sum to 1.
    """

    layers: tuple[int, ...]
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    vocabulary: int
    context: int
    renormalise: bool


class Checkpoint:
    """A checkpoint folder, ``config.json`` and safetensors; nothing else in it is read.

    Args:
        path: the folder.

    Raises:
        InputError: if it is missing, damaged, or of an architecture that is not supported.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            config = json.loads((self.path / "config.json").read_text())
        except OSError as error:
            raise InputError(f"{self.path} is no checkpoint folder: its config.json cannot be read") from error
        except ValueError as error:
            raise InputError(f"{self.path / 'config.json'} is not valid JSON: get the checkpoint again") from error
        model_type = config.get("model_type") if isinstance(config, dict) else None
        if model_type not in MODEL_TYPES:
            raise InputError(f"{self.path} is a {model_type!r} model, and this version runs {', '.join(MODEL_TYPES)}")
        try:
            self.shape = _shape(config)
        except (KeyError, TypeError) as error:
            raise InputError(f"{self.path / 'config.json'} lacks {error}: get the checkpoint again") from error
        self._file_of = self._index()

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read from its file.

        Raises:
            InputError: if it is missing or its file is damaged.
        """
        if name not in self._file_of:
            raise InputError(f"{self.path} has no tensor {name}: get the checkpoint again")
        with _opened(self._file_of[name]) as file:
            return file.get_tensor(name)

    def fingerprint(self) -> str:
        """Digest of the shape and of every router's weights: it tells fine-tunes of one architecture apart."""
        digest = hashlib.sha256(repr(self.shape).encode())
        for layer in self.shape.layers:
            digest.update(self.tensor(f"model.layers.{layer}.mlp.gate.weight").contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def layout(self, kind: str, group: int = 0) -> StoreLayout:
        """Layout of this model's store with pages of one format."""
        page_format = PageFormat(kind, self.shape.hidden, self.shape.intermediate, group)
        return StoreLayout(self.fingerprint(), len(self.shape.layers), self.shape.experts, page_format)

    def pages(self, page_format: PageFormat) -> Iterator[torch.Tensor]:
        """Every expert's page, expert by expert, layer by layer; one expert in memory at a time."""
        for layer in self.shape.layers:
            for e in range(self.shape.experts):
                prefix = f"model.layers.{layer}.mlp.experts.{e}"
                gate, up, down = (self.tensor(f"{prefix}.{part}_proj.weight") for part in ("gate", "up", "down"))
                yield page_format.pack(torch.cat((gate, up)), down)

    def _index(self) -> dict[str, Path]:
        """Tensor name -> file, from the index of a sharded checkpoint or from the single file."""
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            try:
                names = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError) as error:
                raise InputError(f"{index} is damaged: get the checkpoint again") from error
            # Only the last part of a name: an index cannot point outside its folder.
            return {name: self.path / Path(file).name for name, file in names.items()}
        file = self.path / "model.safetensors"
        with _opened(file) as opened:
            return dict.fromkeys(opened.keys(), file)


def _opened(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is missing, cut short or damaged ({error}): get the checkpoint again") from error


def _shape(config: dict) -> MoeShape:
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    return MoeShape(
        layers=tuple(i for i in range(config["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0),
        experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        hidden=config["hidden_size"],
        intermediate=config["moe_intermediate_size"],
        vocabulary=config["vocab_size"],
        context=config["max_position_embeddings"],
        renormalise=config.get("norm_topk_prob", False),
    )
