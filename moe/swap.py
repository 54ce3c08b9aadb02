"""Swap routing and experts into a transformers model, for as long as it is wanted."""

from collections.abc import Callable
from functools import partial
from types import MethodType

import torch

from cachemoe.kernels.reference import Routing
from cachemoe.moe.layers import Probe, moe_layers, probe
from cachemoe.moe.models import SWAPPED_EXPERTS
from cachemoe.moe.routers import RouterOutput

RouteLayer = Callable[[int, torch.Tensor, torch.Tensor], Routing]
PlaceLayer = Callable[[int, torch.Tensor, torch.Tensor], Routing]
RunExperts = Callable[[int, torch.Tensor, Routing], torch.Tensor]


class Swap:
    """While it is open, a model's experts run through ``experts``, and its routers choose through ``route``.

    A context manager; leaving it gives the model its own routers and experts back.

    Args:
        model: as ``load_model`` or ``load_without_experts`` gives it.
        route: (MoE layer, ``[S, E]`` router logits of S = B * T tokens, ``[S, H]`` what the router saw) -> ``Routing``.
            None: the model's own routers choose, bit for bit.
        experts: (MoE layer, ``[S, H]`` hidden states, the layer's ``Routing``) -> ``[S, H]``; None: the model's own.
        place: (MoE layer, ``[S, K]`` ids, ``[S, K]`` weights) -> ``Routing``, of what the model's own routers chose;
            needed by ``experts`` where there is no ``route``.

    Raises:
        InputError: if the model has no MoE layer that this can be done to.
    """

    def __init__(
        self,
        model,
        route: RouteLayer | None,
        experts: RunExperts | None = None,
        place: PlaceLayer | None = None,
    ):
        self._model = model
        self.layers = moe_layers(model)
        self._route, self._experts, self._place = route, experts, place
        self._probes = [] if route is None else [probe(layer) for layer in self.layers]

    @property
    def routers(self) -> list[torch.Tensor]:
        """``[E, H]``, each MoE layer's router weight."""
        return [layer.router.weight for layer in self.layers]

    def __enter__(self):
        self._routing: dict[int, tuple[Routing, torch.Tensor]] = {}  # and the ids that the router answered
        self._own_forward = [vars(layer.router).get("forward") for layer in self.layers if self._route is not None]
        for number, layer in enumerate(self.layers):
            if self._route is not None:
                # The instance's forward, not its class: hooks that look for the router's type keep working.
                forward = partial(self._route_tokens, number, self._probes[number], layer.router.forward)
                layer.router.forward = MethodType(forward, layer.router)
            if self._experts is not None:
                layer.experts.cachemoe_run = partial(self._run_experts, number)
        if self._experts is not None:
            self._own_experts = self._model.get_experts_implementation()
            self._model.set_experts_implementation(SWAPPED_EXPERTS)
        return self

    def __exit__(self, *_):
        if self._experts is not None:
            self._model.set_experts_implementation(self._own_experts)
        for layer in self.layers:
            if self._route is not None:
                del layer.router.forward
                if (forward := self._own_forward.pop(0)) is not None:  # another swap's, around this one
                    layer.router.forward = forward
            if self._experts is not None:
                del layer.experts.cachemoe_run

    def _route_tokens(self, number: int, known: Probe, own, router, hidden_states, *arguments, **options):
        """What the router's forward returns, with other experts."""
        seen = hidden_states.reshape(-1, hidden_states.shape[-1])
        if known.logits_of is not None:
            logits = known.logits_of(router, seen)
        else:
            logits = RouterOutput.of(own(hidden_states, *arguments, **options), known.output.logits.shape[1]).logits
        routing = self._route(number, logits, seen)
        answer = known.output.like(logits, routing.weights.flatten(0, 1), routing.ids.flatten(0, 1))
        self._routing[number] = routing, answer[known.output.order.index("ids")]
        return answer

    def _run_experts(self, number: int, hidden_states, ids, weights) -> torch.Tensor:
        if self._route is None:
            return self._experts(number, hidden_states, self._place(number, ids, weights))
        routing, answered = self._routing[number]
        if ids is not answered and not torch.equal(ids, answered):
            raise RuntimeError("the experts are called with other ids than the layer's router answered")
        return self._experts(number, hidden_states, routing)
