"""Swap routing and experts into a transformers model. The only file that imports transformers."""

import os
from collections.abc import Callable
from functools import partial
from types import MethodType

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from transformers.integrations.moe import ExpertsInterface

from cachemoe.kernels.reference import Routing
from cachemoe.offload.errors import InputError

RouteLayer = Callable[[int, torch.Tensor, torch.Tensor], Routing]
RunExperts = Callable[[int, torch.Tensor, Routing], torch.Tensor]

# Blocks whose router is softmax over ``weight``, one name for each entry of checkpoint.MODEL_TYPES.
_BLOCKS = ("Qwen2MoeSparseMoeBlock",)
_IMPLEMENTATION = "cachemoe"
RESIDENT_EXPERTS = "grouped_mm"


def load_model(path: str | os.PathLike, dtype: torch.dtype = torch.float32):
    """A causal language model from a local folder of safetensors, for inference on the CPU.

    Raises:
        InputError: if transformers cannot load it, or a tensor is missing.
    """
    transformers.utils.logging.disable_progress_bar()
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            experts_implementation=RESIDENT_EXPERTS,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"transformers cannot load {path}: {reason}") from error
    # transformers fills what is missing with random numbers and goes on.
    if absent := sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"]):
        raise InputError(f"{path} lacks {len(absent)} of the model's tensors, {absent[0]} first: get it again")
    return model.eval().requires_grad_(False)


def static_cache(model, length: int):
    """A key-value cache of fixed size, for ``DecodeGraph``: room for ``length`` tokens at addresses that stay."""
    return transformers.StaticCache(config=model.config, max_cache_len=length)


class Swap:
    """While it is open, a model's routers choose through ``route`` and, if given, its experts run through ``experts``.

    A context manager; leaving it gives the model its own routers and experts back.

    Args:
        model: as ``load_model`` gives it.
        route: (MoE layer, ``[S, E]`` router logits of S = B * T tokens, ``[S, H]`` what the router saw) -> ``Routing``.
        experts: (MoE layer, ``[S, H]`` hidden states, the layer's ``Routing``) -> ``[S, H]``; None: the model's own.

    Raises:
        InputError: if the model has no MoE block that this version knows.
    """

    def __init__(self, model, route: RouteLayer, experts: RunExperts | None = None):
        self._model = model
        self._blocks = [module for module in model.modules() if type(module).__name__ in _BLOCKS]
        if not self._blocks:
            raise InputError(f"{type(model).__name__} has none of the MoE blocks {', '.join(_BLOCKS)}")
        self._route = route
        self._experts = experts

    @property
    def routers(self) -> list[torch.Tensor]:
        """``[E, H]``, each MoE layer's router weight."""
        return [block.gate.weight for block in self._blocks]

    def __enter__(self):
        self._routing: dict[int, Routing] = {}
        for layer, block in enumerate(self._blocks):
            # The instance's forward, not its class: hooks that look for the router's type keep working.
            block.gate.forward = MethodType(partial(self._route_tokens, layer), block.gate)
            block.experts.cachemoe_run = partial(self._run_experts, layer)
        if self._experts is not None:
            self._own_experts = self._model.get_experts_implementation()
            self._model.set_experts_implementation(_IMPLEMENTATION)
        return self

    def __exit__(self, *_):
        if self._experts is not None:
            self._model.set_experts_implementation(self._own_experts)
        for block in self._blocks:
            del block.gate.forward, block.experts.cachemoe_run

    def _route_tokens(self, layer: int, router, hidden_states: torch.Tensor):
        """What the router's forward returns: logits, weights and ids of all tokens."""
        seen = hidden_states.reshape(-1, router.hidden_dim)
        logits = F.linear(seen, router.weight)
        self._routing[layer] = routing = self._route(layer, logits, seen)
        return logits, routing.weights.flatten(0, 1).to(logits), routing.ids.flatten(0, 1).to(logits.device)

    def _run_experts(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        return self._experts(layer, hidden_states, self._routing[layer])


def _experts_forward(experts, hidden_states, top_k_index, top_k_weights):
    """transformers' experts interface; the ids and weights are those of the layer's ``Routing``."""
    return experts.cachemoe_run(hidden_states)


ExpertsInterface.register(_IMPLEMENTATION, _experts_forward)
