"""Hugging Face checkpoints on disk: what the MoE layers are, and their experts one at a time, as pages."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten

import torch

from cachemoe.kernels.formats import FLOATS, PageFormat
from cachemoe.kernels.quantize import MXFP4_BLOCK, dequantize_mxfp4
from cachemoe.moe.architectures import EXPERTS, EXPERTS_A_LAYER, NAMINGS, PLAIN, Naming
from cachemoe.moe.config import CONFIG, activation_of, format_of, read_config, said, top_k_of
from cachemoe.moe.hub import commit_of
from cachemoe.moe.shape import MoeShape
from cachemoe.moe.shards import Shards, file_stamp
from cachemoe.moe.tensor_names import IMPOSSIBLE_NUMBER, find
from cachemoe.offload.errors import InputError
from cachemoe.offload.header import TensorEntry, shown
from cachemoe.offload.store import UNKNOWN_MODEL, StoreLayout

STEEPMOE, TINYMOE, COARSEMOE = (Path(__file__).parent / name for name in ("steepmoe", "tinymoe", "coarsemoe"))
DEFAULT_MODEL = STEEPMOE  # its gates have a real model's shape
ADAPTER = "adapter_config.json"  # of peft's; transformers puts it onto the weights
READABLE = ("mxfp4",)  # of quantisations that a checkpoint may have


class Checkpoint:
    """A checkpoint folder, ``config.json`` and safetensors: weights are read when asked for, before that headers.

    Args:
        path: the folder.

    Attributes:
        config: the fields of ``config.json``, those of its ``text_config`` among them, without those that are null.
        shape: see ``MoeShape``.
        dtype: of the experts' weights, bfloat16 where they are mxfp4.
        tensors: the ``Shards``.

    Raises:
        InputError: if it is missing, damaged, has no experts, or has experts that cachemoe cannot compute.
    """

    def __init__(self, path: str | os.PathLike):
        self.path, self.opened_ns = Path(path), time.time_ns()
        self._config_stamp = file_stamp(self.path, CONFIG)
        self.config = read_config(self.path)
        self._experts = EXPERTS.get(self.config.get("model_type"), PLAIN)
        self._check_computable()
        self.tensors = Shards(self.path)
        self._check_numbers()
        self._naming, self._prefixes = self._find_experts()
        try:
            self.shape = self._shape()
        except KeyError as error:
            raise InputError(f"{self.path / CONFIG} lacks {error}") from error
        self._check_shapes()
        self._check_config()
        self.page_format()  # whether there is one: load would refuse without

    def is_expert(self, name: str) -> bool:
        """Whether a tensor belongs to an expert, and so to a page."""
        for end in ("_bias", "_blocks", "_scales"):
            name = name.removesuffix(end)
        return any(find(name, part) for part in self._naming.parts)

    @property
    def stamp(self) -> tuple[tuple, ...]:
        """Of each file what ``file_stamp`` told before its header was read."""
        return (self._config_stamp, *self.tensors.stamps)

    def check_unchanged(self) -> None:
        """Whether the files are as they were when they were opened.

        Raises:
            InputError: if not.
        """
        for before in self.stamp:
            if file_stamp(self.path, before[0]) != before:
                raise InputError(f"{self.path / before[0]} has changed while it was in use: load the checkpoint again")

    def page_format(self, kind: str | None = None, group: int | None = None) -> PageFormat:
        """Layout of one expert's page.

        Args:
            kind: one of ``formats.KINDS``; None: the checkpoint's own precision.
            group: of int4 and int2; None: the largest that divides H and I.

        Raises:
            InputError: if the experts do not fit into it.
        """
        size = self.shape.hidden, self.shape.intermediate
        return format_of(kind, group, self.config, size, self.dtype, bias=self._biased)

    def layout(self, kind: str | None = None, group: int | None = None) -> StoreLayout:
        """Layout of this model's store with pages of one format, see ``page_format``; for no weights in particular."""
        page_format = self.page_format(kind, group)
        layers, experts, revision = len(self.shape.layers), self.shape.experts, commit_of(self.path) or ""
        return StoreLayout(UNKNOWN_MODEL, layers, experts, page_format, revision)

    def pages(self, page_format: PageFormat) -> Iterator[torch.Tensor]:
        """Every expert's page, expert by expert, layer by layer; one expert in memory at a time."""
        for layer in range(len(self.shape.layers)):
            for e in range(self.shape.experts):
                yield page_format.pack(**self.expert(layer, e))

    def expert(self, layer: int, e: int) -> dict[str, torch.Tensor]:
        """One expert's ``gate_up`` ``[2I, H]`` and ``down`` ``[H, I]``, and their ``_bias`` where there are any.

        Raises:
            InputError: if the file ends early.
        """
        naming = self._naming
        if naming.gate_up:
            weights = {"gate_up": self._matrix(layer, e, naming.gate_up), "down": self._matrix(layer, e, naming.down)}
        else:
            gate, up, down = (self._matrix(layer, e, part) for part in (naming.gate, naming.up, naming.down))
            weights = {"gate_up": torch.cat((gate, up)), "down": down}
        if self._biased:
            for name, part in (("gate_up_bias", naming.gate_up), ("down_bias", naming.down)):
                weights[name] = self.tensors.read(*self._place(layer, e, f"{part}_bias"))
        return weights

    def _matrix(self, layer: int, e: int, part: str) -> torch.Tensor:
        """``[out, in]`` of one of the naming's parts."""
        if self._naming.blocks:
            blocks, scales = (self.tensors.read(*self._place(layer, e, part + end)) for end in ("_blocks", "_scales"))
            return dequantize_mxfp4(blocks, scales)
        weight = self.tensors.read(*self._place(layer, e, part))
        return weight.T if self._transposed else weight

    def _place(self, layer: int, e: int, part: str) -> tuple:
        """What ``Shards.read`` wants for one expert's share of a part: its name, and its row where all are in one."""
        if "{}" in part:
            return (self._prefixes[layer] + part.format(e),)
        return self._prefixes[layer] + part, e

    def _find_experts(self) -> tuple[Naming, list[str]]:
        """How the experts are named, and what stands before it, MoE layer by MoE layer."""
        layers = self.config.get("num_hidden_layers", float("inf"))
        for naming in NAMINGS:
            first = naming.parts[0] + ("_blocks" if naming.blocks else "")
            stems: dict[str, dict[int, str]] = {}
            for name in self.tensors.entries:
                if (found := find(name, first)) and found.layer < layers:
                    prefixes = stems.setdefault(found.stem, {})
                    if (other := prefixes.setdefault(found.layer, found.prefix)) != found.prefix:
                        raise InputError(
                            f"{self.path} has two sets of experts in layer {found.layer}, {shown(other)} and "
                            f"{shown(found.prefix)}: which of them the model uses cannot be known"
                        )
            if stems:  # layers that predict further tokens have a stem of their own: the model's has the most
                model, *others = sorted(stems.values(), key=len, reverse=True)
                if others and len(others[0]) == len(model):
                    first, second, *_ = (next(iter(each.values())) for each in (model, *others))
                    raise InputError(
                        f"{self.path} has the experts of two models, {shown(first)} and {shown(second)}, each in "
                        f"{len(model)} layers: save the one to be run by itself"
                    )
                self._layers = tuple(sorted(model))
                return naming, [model[layer] for layer in self._layers]
        raise InputError(
            f"{self.path} is no MoE model, or names its experts in a way that cachemoe does not know "
            f"(a {said(self.config.get('model_type'))} model): see moe/architectures.py"
        )

    def _shape(self) -> MoeShape:
        config, naming = self.config, self._naming
        down = self._entry(self._place(0, 0, naming.down + ("_scales" if naming.blocks else ""))[0])
        shape = down.shape
        if "{}" in naming.down:
            experts = self._count(naming.down)
        else:
            experts, *shape = shape or (0,)
        if len(shape) != 2 or not all((experts, *shape)):
            raise InputError(f"{self.path} has experts whose matrices are of {tuple(down.shape)}, which cannot be")
        self._transposed = False
        if "{}" not in naming.down and not naming.blocks:  # of each ``[in, out]``: the shapes fit that, or the other
            gate_up = self._entry(self._place(0, 0, naming.gate_up)[0]).shape
            self._transposed = gate_up == (experts, shape[1], 2 * shape[0])
        hidden, intermediate = reversed(shape) if self._transposed else shape
        if naming.blocks:
            intermediate *= MXFP4_BLOCK
            if hidden % MXFP4_BLOCK:
                raise InputError(
                    f"{self.path} has mxfp4 experts of H = {hidden}, which is no multiple of {MXFP4_BLOCK}, the "
                    "size of mxfp4's blocks: the file is damaged, or no mxfp4"
                )
        self.dtype = torch.bfloat16 if naming.blocks else down.dtype
        biases = [f"{prefix}{part}_bias" for prefix in self._prefixes for part in naming.parts]
        self._biased = any(name in self.tensors for name in biases)
        return MoeShape(
            layers=self._layers,
            experts=experts,
            top_k=top_k_of(config),
            hidden=hidden,
            intermediate=intermediate,
            vocabulary=config["vocab_size"],
            context=config.get("max_position_embeddings"),
        )

    def _count(self, part: str) -> int:
        """Experts of every layer, where each has a tensor of its own."""
        counts, prefixes = dict.fromkeys(self._layers, 0), set(self._prefixes)
        for name in self.tensors.entries:
            if (found := find(name, part)) and found.prefix in prefixes:
                counts[found.layer] += 1
        if len(set(counts.values())) > 1:
            layer, count = min(counts.items(), key=lambda item: item[1])
            raise InputError(
                f"{self.path} has {max(counts.values())} experts in some layers and {count} in layer {layer}: it lacks "
                "tensors, or is a model whose layers differ, which cachemoe does not run"
            )
        return max(counts.values())

    def _check_shapes(self) -> None:
        """Whether every tensor of every expert has the dtype and the shape that it must have: nothing is broadcast.

        And whether the experts have no tensors besides: a bias that no page has would be left out of every product.

        Raises:
            InputError: naming the first tensor for which it does not hold.
        """
        hidden, intermediate, naming = self.shape.hidden, self.shape.intermediate, self._naming
        sizes = {naming.gate: (intermediate, hidden), naming.up: (intermediate, hidden)}
        sizes |= {naming.gate_up: (2 * intermediate, hidden), naming.down: (hidden, intermediate)}
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for part in naming.parts:
            rows, columns = sizes[part]
            if naming.blocks:
                expected[f"{part}_blocks"] = (rows, columns // MXFP4_BLOCK, MXFP4_BLOCK // 2), torch.uint8
                expected[f"{part}_scales"] = (rows, columns // MXFP4_BLOCK), torch.uint8
            else:
                expected[part] = (columns, rows) if self._transposed else (rows, columns), self.dtype
            if self._biased:
                dtype = self._entry(self._place(0, 0, f"{part}_bias")[0]).dtype
                expected[f"{part}_bias"] = (rows,), dtype if dtype in FLOATS.values() else self.dtype
        read: set[str] = set()
        for number in range(len(self.shape.layers)):
            for part, (shape, dtype) in expected.items():
                fused = "{}" not in part
                whole = (self.shape.experts, *shape) if fused else shape
                for e in range(1 if fused else self.shape.experts):
                    name = self._place(number, e, part)[0]
                    entry = self._entry(name)
                    if (entry.shape, entry.dtype) != (whole, dtype):
                        raise InputError(
                            f"{self.path} has {name} of {entry.shape} in {entry.dtype}, where the model's experts need "
                            f"{whole} in {dtype}"
                        )
                    read.add(name)
        modules = {part.partition("{}")[0] if "{}" in part else f"{part.rpartition('.')[0]}." for part in naming.parts}
        inside = tuple(prefix + module for prefix in self._prefixes for module in modules)
        for name in self.tensors.entries:
            if name.startswith(inside) and name not in read and not self.is_expert(name):  # those of no whole expert
                raise InputError(
                    f"{self.path} has {shown(name)} among its experts' weights, with which cachemoe does not compute: "
                    "the model's experts are of another kind, or the file has more than one copy of them"
                )

    def _check_config(self) -> None:
        """Whether the config says of the experts what their tensors are.

        Only H and E are asked: which field gives an expert's I depends on the model's class, which ``load`` asks.
        """
        shape, config = self.shape, self.config
        if not 1 <= shape.top_k <= shape.experts:
            raise InputError(f"{self.path} uses {said(shape.top_k)} of {shape.experts} experts, which cannot be")
        for name, size in {"hidden_size": shape.hidden, **dict.fromkeys(EXPERTS_A_LAYER, shape.experts)}.items():
            if type(config.get(name)) is int and config[name] != size:
                raise InputError(
                    f"{self.path / CONFIG} has {name} = {said(config[name])}, and the experts in its files have "
                    f"{size}: one of the two is another model's"
                )

    def _check_numbers(self) -> None:
        """Whether layers and experts have numbers that can be: others would be looked at as no experts at all."""
        for name in self.tensors.entries:
            if IMPOSSIBLE_NUMBER.search(name):
                raise InputError(f"{self.path} has a layer or an expert of a number that cannot be: {shown(name)}")

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.tensors:
            self.tensors.read(name)  # which says why there is none
        return self.tensors.entries[name]

    def _check_computable(self) -> None:
        """Whether config and folder ask for nothing that pages and experts do not have."""
        if (self.path / ADAPTER).exists():
            raise InputError(
                f"{self.path} has an adapter beside its weights ({ADAPTER}), which cachemoe does not read: merge it "
                "into them (peft's merge_and_unload) and save the result, or remove it"
            )
        quantised = self.config.get("quantization_config") or {}
        method = quantised.get("quant_method")
        if quantised and method not in READABLE:
            raise InputError(
                f"{self.path} is quantised by {shorten(str(method), 80)}, which cachemoe does not read: take the "
                "unquantised checkpoint, and let `cachemoe pack --format int4` quantise its experts"
            )
        activation_of(self.config)
