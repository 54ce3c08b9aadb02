"""The experts of a model that is in memory already: the same as a checkpoint's, from its parameters."""

import hashlib
from collections.abc import Iterator

import torch

from cachemoe.kernels.formats import PageFormat
from cachemoe.moe.checkpoint import MoeShape, format_of, top_k_of
from cachemoe.moe.layers import moe_layers
from cachemoe.offload.errors import InputError
from cachemoe.offload.store import StoreLayout


class ModelExperts:
    """A transformers model's experts one at a time, until they are freed.

    Args:
        model: with its experts' weights in memory.

    Attributes:
        shape: see ``MoeShape``; its ``layers`` count MoE layers alone.
        dtype: of the weights.
        transposed: None: the parameters' form is the model's.

    Raises:
        InputError: if it has no experts, or experts that cachemoe cannot compute.
    """

    transposed = None

    def __init__(self, model):
        self._layers = [layer.experts for layer in moe_layers(model)]
        self.config = model.config.get_text_config().to_dict()
        first = self._layers[0]
        if not first.has_gate or not hasattr(first, "gate_up_proj"):
            raise InputError(f"{type(first).__name__} has experts without a gate, which cachemoe's pages have")
        if first.down_proj.is_meta:
            raise InputError("the model's experts have no weights in memory: it is swapped already, or never loaded")
        self.dtype = first.down_proj.dtype
        hidden, intermediate = first.down_proj.shape[1:][:: -1 if first.is_transposed else 1]
        self.shape = MoeShape(
            layers=tuple(range(len(self._layers))),
            experts=first.num_experts,
            top_k=top_k_of(self.config),
            hidden=hidden,
            intermediate=intermediate,
            vocabulary=self.config["vocab_size"],
            context=self.config.get("max_position_embeddings"),
        )

    def layout(self, kind: str | None) -> StoreLayout:
        """As ``Checkpoint.layout``."""
        shape = self.shape
        size = shape.hidden, shape.intermediate
        page_format = format_of(kind, None, self.config, size, self.dtype, bias=self._layers[0].has_bias)
        digest = hashlib.sha256(repr(shape).encode())
        for layer in self._layers:
            digest.update(layer.down_proj[:, 0].detach().float().cpu().contiguous().numpy())
        return StoreLayout(digest.hexdigest()[:16], len(shape.layers), shape.experts, page_format)

    def expert(self, layer: int, e: int) -> dict[str, torch.Tensor]:
        """As ``Checkpoint.expert``."""
        experts = self._layers[layer]
        weights = {name: getattr(experts, f"{name}_proj")[e].detach().cpu() for name in ("gate_up", "down")}
        if experts.is_transposed:
            weights = {name: weight.T for name, weight in weights.items()}
        if experts.has_bias:
            weights |= {
                f"{name}_bias": getattr(experts, f"{name}_proj_bias")[e].detach().cpu() for name in tuple(weights)
            }
        return weights

    def free(self, layer: int) -> None:
        """Let go of a layer's weights: its parameters go to the ``meta`` device."""
        experts = self._layers[layer]
        for name, parameter in list(experts.named_parameters()):
            setattr(experts, name, torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False))

    def pages(self, page_format: PageFormat) -> Iterator[torch.Tensor]:
        """Every expert's page, expert by expert, layer by layer; a layer is freed when its pages are made."""
        for layer in range(len(self._layers)):
            for e in range(self.shape.experts):
                yield page_format.pack(**self.expert(layer, e))
            self.free(layer)
