"""Swap routing and experts into a transformers model, for as long as it is wanted."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from threading import Lock
from types import MethodType

import torch

from cachemoe.kernels.state import Routing
from cachemoe.moe.doors import NoBackward, refuse_transforms
from cachemoe.moe.layers import Probe, moe_layers, probe, router_marks
from cachemoe.moe.routers import RouterOutput
from cachemoe.offload.packed import to_device

RouteLayer = Callable[[int, torch.Tensor, torch.Tensor], Routing]
RunChosen = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
RunExperts = Callable[[int, torch.Tensor, Routing], torch.Tensor]


class Swap:
    """While it is open, a model's experts run through ``experts``, and its routers choose through ``route``.

    A context manager; leaving it gives the model its own routers and experts back.

    Several threads may call the model: what ``route``, ``place`` and ``experts`` do with a layer's residency is done by
    one thread at a time. Where another thread has routed the layer since this one's router answered, what the router
    chose is placed anew.

    Args:
        model: as ``load_model`` or ``load_without_experts`` gives it.
        route: (MoE layer, ``[S, E]`` router logits of S = B * T tokens, ``[S, H]`` what the router saw) -> ``Routing``.
            None: the model's own routers choose, bit for bit.
        experts: (MoE layer, ``[S, H]`` hidden states, the layer's ``Routing``) -> ``[S, H]``; None: the model's own.
        chosen: (MoE layer, ``[S, H]`` hidden states, ``[S, K]`` ids, ``[S, K]`` weights) -> ``[S, H]``, as ``experts``,
            of what has been chosen already; needed by it where there is no ``route``, and by threads.
        lock: held around all three, which may not call the model.

    Raises:
        InputError: if the model has no MoE layer that this can be done to.
    """

    def __init__(
        self,
        model,
        route: RouteLayer | None,
        experts: RunExperts | None = None,
        chosen: RunChosen | None = None,
        lock: AbstractContextManager | None = None,
    ):
        self.layers = moe_layers(model)
        self._route, self._experts, self._chosen = route, experts, chosen
        self.lock = lock or Lock()
        self._asked, self._marks = [], None
        self._probes = self._probed(route)

    @property
    def routers(self) -> list[torch.Tensor]:
        """``[E, H]``, each MoE layer's router weight."""
        return [layer.router.weight for layer in self.layers]

    def __enter__(self):
        # Of each layer the last routing, while no other change of its residency has followed, and the ids that the
        # router answered, which another's code may change in place before the experts have them.
        self._routed: dict[int, tuple[Routing, torch.Tensor, torch.Tensor]] = {}
        self._own_experts = self._replace(self._run_experts, [layer.experts for layer in self.layers if self._experts])
        self._own_routers = self._replace_routers()
        return self

    def __exit__(self, *_):
        for own in (self._own_routers, self._own_experts):
            _restore(own)
            own.clear()

    def reroute(self, make_route: Callable[[], RouteLayer | None]) -> None:
        """Route otherwise from now on; the experts stay swapped throughout, whoever calls them meanwhile.

        Args:
            make_route: called while the model has its own routers, which can then be asked; where it gives None, those
                choose.

        Raises:
            InputError: if routers cannot be asked; the routing is then as it was.
        """
        with self.lock:
            _restore(self._own_routers)
            try:
                route = make_route()
                self._probes, self._route = self._probed(route) or self._probes, route
                self._routed.clear()
            finally:
                self._own_routers = self._replace_routers()

    def forget(self, *layers: int) -> None:
        """Slots of these layers, or of all, have changed: what their routers have answered is placed anew."""
        for layer in layers or list(self._routed):
            self._routed.pop(layer, None)

    def _probed(self, route: RouteLayer | None) -> list[Probe]:
        """Of each router, which is asked again only if it has been changed."""
        if route is None:
            return []
        if (marks := router_marks(self.layers)) != self._marks:
            self._asked, self._marks = [probe(layer) for layer in self.layers], marks
        return self._asked

    def _replace_routers(self) -> list[tuple[torch.nn.Module, Callable | None]]:
        # The route goes with the forward: a thread that is within one keeps its own.
        forward = partial(self._route_tokens, self._route)
        return self._replace(forward, [layer.router for layer in self.layers if self._route])

    def _replace(self, forward: Callable, modules: list) -> list[tuple[torch.nn.Module, Callable | None]]:
        """Put another forward into instances, not their class: hooks that look for the modules' type keep working.

        It does not depend on the experts implementation that transformers is set to.

        Returns:
            What ``_restore`` needs.
        """
        own = [(module, vars(module).get("forward")) for module in modules]
        for number, module in enumerate(modules):
            module.forward = MethodType(partial(forward, number, module.forward), module)
        return own

    def _route_tokens(
        self, route: RouteLayer, number: int, own: Callable, router, hidden_states, *arguments, **options
    ):
        """What the router's forward returns, with other experts."""
        known = self._probes[number]
        seen = hidden_states.reshape(-1, hidden_states.shape[-1])
        if known.logits_of is not None:
            logits = known.logits_of(router, seen)
        else:
            logits = RouterOutput.of(own(hidden_states, *arguments, **options), known.output.logits.shape[1]).logits
        with self.lock:
            routing = route(number, logits, seen)
            ids, weights = (each.flatten(0, 1) for each in (routing.ids, routing.weights))
            ids, weights = to_device(logits.device, ids, weights)
            answer = known.output.like(logits, weights, ids)
            answered = answer[known.output.order.index("ids")]
            self._routed[number] = routing, answered, answered if answered.is_cuda else answered.clone()
        return answer

    def _run_experts(self, number: int, own: Callable, module, hidden_states, ids, weights) -> torch.Tensor:
        refuse_transforms(hidden_states, weights)
        with self.lock:
            routing, answered, before = self._routed.pop(number, (None, None, None))
            # A GPU's ids are not read, which would wait for it: the same tensor has the same ids.
            if routing is not None and ((ids is answered and ids.is_cuda) or torch.equal(ids, before)):
                routing.weights = weights[None].float()  # which the block may have changed
                y = self._experts(number, hidden_states, routing)
            elif self._chosen is None:
                raise RuntimeError("the experts are called with other ids than the layer's router answered")
            else:
                y = self._chosen(number, hidden_states, ids, weights)
        if torch.is_grad_enabled() and (hidden_states.requires_grad or weights.requires_grad):
            y = NoBackward.apply(y, hidden_states, weights)
        return y


def _restore(own: list[tuple[torch.nn.Module, Callable | None]]) -> None:
    for module, forward in own:
        vars(module).pop("forward", None)
        if forward is not None:  # another swap's, around this one
            module.forward = forward
