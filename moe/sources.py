"""What says ahead of a layer which experts it chooses: its gate on the input of the layer before, or the token alone.

Where that decides, a layer's experts are asked for before those of the layer before run (Pre-gated MoE, arXiv
2308.12066, whose gates are trained for it); where it does not, they are prefetched, and the router decides.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import get_ident, local

import torch

from cachemoe.kernels.state import Residency, Routing
from cachemoe.moe.calibration import Calibration
from cachemoe.moe.layers import gates_of, moe_layers
from cachemoe.moe.policies.rule import GATE, TOKEN, Rule
from cachemoe.offload.errors import InputError
from cachemoe.offload.prefetch import Prediction
from cachemoe.offload.ticket import Ticket

Gate = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def gates_ahead(model, rule: Rule, calibration: Calibration | None) -> Iterator[Sequence[Gate]]:
    """The gates that a rule's source asks, for as long as it is open; none for a rule that has no source.

    Raises:
        InputError: if the model cannot serve the source.
    """
    if rule.source == GATE:
        yield gates_of(moe_layers(model))
    elif rule.source == TOKEN:
        table = TokenTable(model, calibration)
        try:
            yield table.gates
        finally:
            table.close()
    else:
        yield []


class Ahead:
    """Routes each layer when the one before has been routed; the first by its own logits.

    Threads each have their own sequence.

    Args:
        gates: of each layer, from what the layer before's gate saw, ``[S, H]``, to ``[S, E]`` logits.
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


class TokenTable:
    """Gates that ask a calibration's table for the tokens that the model is at, whatever the hidden states.

    Args:
        model: of transformers; hooks on it and its embedding note the tokens of each call until ``close``.
        calibration: of the model.
    """

    def __init__(self, model, calibration: Calibration):
        self._known, self._table = calibration.token_ids.long(), calibration.by_token.float()
        self._at = local()  # rows of the table, of each thread's own call
        self.gates = [partial(self._logits, layer) for layer in range(len(self._table))]
        self._hooks = (
            model.register_forward_pre_hook(self._forget),
            model.get_input_embeddings().register_forward_pre_hook(self._note),
        )

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _forget(self, model, arguments) -> None:
        self._at.rows = None  # a call may be given no tokens, but their embeddings

    def _note(self, embedding, arguments) -> None:
        tokens = arguments[0].flatten().cpu()
        place = torch.searchsorted(self._known, tokens).clamp(max=len(self._known) - 1)
        self._at.rows = torch.where(self._known[place] == tokens, place, len(self._known))

    def _logits(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        rows = getattr(self._at, "rows", None)
        if rows is None or len(rows) != len(hidden):
            raise InputError("what is known by token alone needs the tokens: call the model with input_ids")
        return self._table[layer, rows].to(hidden.device)


class Forecast:
    """Tells a cache that layers share which experts a token's next layers are expected to choose.

    Args:
        gates: as for ``Ahead``.
        choose: (layer, ``[E]`` logits) -> the experts that the layer would choose with them.
        window: layers looked ahead.
    """

    def __init__(self, gates: Sequence[Gate], choose: Callable[[int, torch.Tensor], list[int]], window: int):
        self._gates, self._choose, self._window = gates, choose, window
        self._expected: list[list[int]] = []  # of each layer, for the token that is under way

    def note(self, layer: int, tokens: torch.Tensor, state: Residency) -> None:
        """Before a layer is routed: of one token what is expected after it, of many nothing.

        Args:
            tokens: ``[S, ...]``, of which only S counts, and what the gates make of them.
            state: shared by the layers, of one cache.
        """
        state.expected.zero_()
        if len(tokens) != 1 or not self._window:
            self._expected = []
            return
        if layer == 0:
            self._expected = [self._choose(i, gate(tokens)[0]) for i, gate in enumerate(self._gates)]
        for later, experts in enumerate(self._expected[layer + 1 : layer + 1 + self._window], layer + 1):
            state.expected[0, [later * state.experts + e for e in experts]] = 1


class Foretold:
    """A prefetcher: the next layer is expected to choose what a gate says of this layer's input.

    Args:
        gates: as for ``Ahead``.
        choose: (layer, ``[E]`` logits) -> the experts that the layer would choose with them.
    """

    ahead = 1

    def __init__(self, gates: Sequence[Gate], choose: Callable[[int, torch.Tensor], list[int]]):
        self._gates, self._choose = gates, choose

    def observe(self, layer: int, ids: list[int]) -> None:
        """Nothing: it has no memory."""

    def predict(self, layer: int, gate_input: torch.Tensor) -> list[Prediction]:
        if (later := layer + 1) == len(self._gates):
            return []
        return [(later, self._choose(later, self._gates[later](gate_input)[0]))]
