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
        except KeyError as error:
            raise InputError(f"{self.path / 'config.json'} lacks {error}: get the checkpoint again") from error
        except (TypeError, ArithmeticError) as error:
            raise InputError(f"{self.path / 'config.json'} has a value that cannot be ({error})") from error
        self._file_of = self._index()

    def fingerprint(self) -> str:
        """Digest of the shape and of a row of each expert's matrices: it tells fine-tunes of one architecture apart."""
        digest = hashlib.sha256(repr(self.shape).encode())
        for names in self._experts():
            for name in names:
                digest.update(self._slice(name)[0].contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def layout(self, kind: str, group: int = 0) -> StoreLayout:
        """Layout of this model's store with pages of one format."""
        page_format = PageFormat(kind, self.shape.hidden, self.shape.intermediate, group)
        return StoreLayout(self.fingerprint(), len(self.shape.layers), self.shape.experts, page_format)

    def pages(self, page_format: PageFormat) -> Iterator[torch.Tensor]:
        """Every expert's page, expert by expert, layer by layer; one expert in memory at a time."""
        for names in self._experts():
            gate, up, down = (self._slice(name)[:] for name in names)
            yield page_format.pack(torch.cat((gate, up)), down)

    def _experts(self) -> Iterator[tuple[str, str, str]]:
        """Names of each expert's gate, up and down matrices, expert by expert, layer by layer."""
        for layer in self.shape.layers:
            for e in range(self.shape.experts):
                prefix = f"model.layers.{layer}.mlp.experts.{e}"
                yield tuple(f"{prefix}.{part}_proj.weight" for part in ("gate", "up", "down"))

    def _slice(self, name: str):
        """A tensor that is read when indexed.

        Raises:
            InputError: if it is missing.
        """
        if name not in self._file_of:
            raise InputError(f"{self.path} has no tensor {name}: get the checkpoint again")
        return self._file_of[name].get_slice(name)

    def _index(self) -> dict:
        """Tensor name -> the opened file that has it, of a sharded checkpoint or a single file."""
        index = self.path / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if index.exists():
            try:
                # Only the last part of a name: an index cannot point outside its folder.
                names = sorted({Path(file).name for file in json.loads(index.read_text())["weight_map"].values()})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{index} is damaged: get the checkpoint again") from error
        files = [_opened(self.path / name) for name in names]
        return {name: file for file in files for name in file.keys()}  # noqa: SIM118 (no mapping)


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
