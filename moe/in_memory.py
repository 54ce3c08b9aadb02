"""The experts of a model that is in memory already: the same as a checkpoint's, from its parameters."""

from collections.abc import Callable, Iterator

import torch
from torch.nn.utils.parametrize import is_parametrized

from cachemoe.kernels.formats import PageFormat
from cachemoe.moe.config import format_of, top_k_of
from cachemoe.moe.doors import free
from cachemoe.moe.layers import moe_layers
from cachemoe.moe.shape import MoeShape
from cachemoe.offload.errors import InputError
from cachemoe.offload.store import UNKNOWN_MODEL, StoreLayout


class ModelExperts:
    """A transformers model's experts one at a time, until they are freed.

    Args:
        model: with its experts' weights in memory.

    Attributes:
        shape: see ``MoeShape``; its ``layers`` count MoE layers alone.
        dtype: of the weights.

    Raises:
        InputError: if it has no experts, or experts that cachemoe cannot compute.
    """

    def __init__(self, model):
        layers = moe_layers(model)
        self._layers = [layer.experts for layer in layers]
        self.config = model.config.get_text_config().to_dict()
        first = self._layers[0]
        for number, (layer, experts) in enumerate(zip(layers, self._layers, strict=True)):
            if not experts.has_gate or not hasattr(experts, "gate_up_proj"):
                raise InputError(f"{type(experts).__name__} has experts without a gate, which cachemoe's pages have")
            if getattr(layer.block, "base_layer", None) is experts or is_parametrized(experts):
                raise InputError(
                    f"{type(layer.block).__name__} adapts the experts' weights while it computes, which pages cannot: "
                    "merge the adapter first (merge_and_unload)"
                )
            if any(parameter.is_meta for parameter in experts.parameters()):
                raise InputError(
                    f"the experts of MoE layer {number} have no weights in memory: the model is swapped already, "
                    "partly offloaded, or never loaded"
                )
            if "forward" in vars(experts) and not hasattr(experts, "_old_forward"):  # accelerate's only moves inputs
                raise InputError(
                    f"the experts of MoE layer {number} have a forward of their own, which pages would not run: undo "
                    "that first"
                )
            forms = ([(name, p.shape, p.dtype) for name, p in each.named_parameters()] for each in (experts, first))
            if next(forms) != next(forms):
                raise InputError(f"the experts of MoE layer {number} differ in shape or dtype from those of layer 0")
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
        return StoreLayout(UNKNOWN_MODEL, len(shape.layers), shape.experts, page_format)

    def check_unchanged(self) -> None:
        """As ``Checkpoint.check_unchanged``: nothing, since nobody else has the model."""

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

    def pages(self, page_format: PageFormat, seen: Callable[[dict], None]) -> Iterator[torch.Tensor]:
        """Every expert's page, expert by expert, layer by layer; a layer is freed when its pages are made.

        Args:
            seen: called with each expert's weights.
        """
        for layer in range(len(self._layers)):
            for e in range(self.shape.experts):
                weights = self.expert(layer, e)
                seen(weights)
                yield page_format.pack(**weights)
            free(self._layers[layer])
