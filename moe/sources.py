"""What a layer is routed by, where that is not its gate on its own input: its gate on the input of the layer before.

So a layer's experts are known a layer early, and asked for before the experts of the layer before run (Pre-gated MoE,
arXiv 2308.12066, whose gates are trained for it; these are the model's own).
"""

from collections.abc import Callable, Sequence
from threading import get_ident

import torch

from cachemoe.kernels.state import Routing
from cachemoe.offload.ticket import Ticket

Gate = Callable[[torch.Tensor], torch.Tensor]


class NextGate:
    """Routes each layer when the one before has been routed; the first by its own logits.

    Threads each have their own sequence.

    Args:
        gates: of each layer, from ``[S, H]`` hidden states to ``[S, E]`` logits.
        route: (layer, ``[S, E]`` logits) -> ``Routing``.
        acquire: (layer, ``Routing``) -> ``Ticket``, which asks an engine for the experts; None: nothing is asked for.
    """

    def __init__(
        self,
        gates: Sequence[Gate],
        route: Callable[[int, torch.Tensor], Routing],
        acquire: Callable[[int, Routing], Ticket] | None = None,
    ):
        self._gates, self._route, self._acquire = gates, route, acquire
        self._ahead: dict[tuple[int, int], tuple[Routing, Ticket | None]] = {}
        self._tickets: dict[tuple[int, int], Ticket] = {}

    def route(self, layer: int, logits: torch.Tensor, hidden: torch.Tensor) -> Routing:
        """The layer's routing; the next layer is routed, and its experts are asked for.

        Args:
            logits: ``[S, E]``, the layer's own, which only the first layer needs.
            hidden: ``[S, H]``, what its gate saw.
        """
        thread = get_ident()
        routing, ticket = self._ahead.pop((thread, layer), (None, None))
        if layer == 0 or routing is None:  # or a call that ended early left it behind
            routing, ticket = self._route(layer, logits), None
        if ticket is not None:
            self._tickets[thread, layer] = ticket
        if (later := layer + 1) < len(self._gates):
            next_routing = self._route(later, self._gates[later](hidden))
            self._ahead[thread, later] = next_routing, self._acquire and self._acquire(later, next_routing)
        return routing

    def claim(self, layer: int, routing: Routing) -> Ticket | Routing:
        """What the engine is to go forward with: the ticket of the layer's experts, if they have been asked for."""
        ticket = self._tickets.pop((get_ident(), layer), None)
        return ticket if ticket is not None and ticket.routing is routing else routing
