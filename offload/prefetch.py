"""Prefetchers: which experts the next layers will probably want; and which of them are worth asking for."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from cachemoe.kernels.state import Residency

Prediction = tuple[int, list[int]]
"""A layer, and the experts that it is expected to choose, likeliest first."""


class Prefetcher(Protocol):
    """Predicts what the next layers will choose for the token that a layer has just routed.

    Attributes:
        ahead: layers looked ahead.
    """

    ahead: int

    def observe(self, layer: int, ids: list[int]) -> None:
        """Learn what a layer chose; called for every token and layer, in order."""

    def predict(self, layer: int, gate_input: torch.Tensor) -> list[Prediction]:
        """For the layers after this one, the nearest first; called only where a page could still land in time.

        Args:
            layer: that has routed.
            gate_input: ``[1, H]``, what its router saw.
        """


class NextLayerGate:
    """The routers of the next layers on this layer's gate input (HOBBIT, AdapMoE), by the routing strategy in use.

    Args:
        routers: ``[E, H]``, each layer's weight.
        choose: (layer, ``[E]`` logits) -> the experts that the layer would choose with them.
        ahead: p; the last layer's next is the next token's first, of which it knows nothing.
        holds: (layer, expert) -> whether it is resident: the first layer with one that is not is then the last that is
            predicted, as in HOBBIT (arXiv 2411.01433). None: all p are.
    """

    def __init__(
        self,
        routers: Sequence[torch.Tensor],
        choose: Callable[[int, torch.Tensor], list[int]],
        ahead: int = 1,
        holds: Callable[[int, int], bool] | None = None,
    ):
        self.ahead, self._holds = ahead, holds
        self._choose, self._experts = choose, len(routers[0])
        # One matmul for all layers looked at.
        self._stacked = [torch.cat(list(routers[i + 1 : i + 1 + ahead])) for i in range(len(routers) - 1)]

    def observe(self, layer: int, ids: list[int]) -> None:
        """Nothing: it has no memory."""

    def predict(self, layer: int, gate_input: torch.Tensor) -> list[Prediction]:
        if layer >= len(self._stacked):
            return []
        weight = self._stacked[layer]
        logits = (weight @ gate_input[0].to(weight.dtype)).split(self._experts)
        predictions = []
        for later, each in enumerate(logits, layer + 1):
            predictions.append((later, chosen := self._choose(later, each)))
            if self._holds is not None and not all(self._holds(later, e) for e in chosen):
                break
        return predictions


class PreviousToken:
    """Each layer is expected to choose what it chose for the token before.

    Args:
        layers: L; after the last comes the next token's first.
        ahead: layers looked ahead.
    """

    def __init__(self, layers: int, ahead: int = 1):
        self.ahead = ahead
        self._chosen: list[list[int]] = [[] for _ in range(layers)]

    def observe(self, layer: int, ids: list[int]) -> None:
        self._chosen[layer] = ids

    def predict(self, layer: int, gate_input: torch.Tensor) -> list[Prediction]:
        after = [(layer + 1 + i) % len(self._chosen) for i in range(self.ahead)]
        return [(later, self._chosen[later]) for later in after]


class Frequency:
    """Each layer is expected to choose the experts that it has chosen most often.

    Args:
        state: () -> the ``Residency`` of all layers, which counts uses.
        top_k: K, experts named for each layer.
        ahead: layers looked ahead; after the last comes the next token's first.
    """

    def __init__(self, state: Callable[[], Residency], top_k: int, ahead: int = 1):
        self.ahead = ahead
        self._state, self._top_k = state, top_k

    def observe(self, layer: int, ids: list[int]) -> None:
        """Nothing: the residency remembers."""

    def predict(self, layer: int, gate_input: torch.Tensor) -> list[Prediction]:
        state = self._state()
        uses = state.uses.view(-1, state.experts)
        after = [(layer + 1 + i) % len(uses) for i in range(self.ahead)]
        return [(later, uses[later].topk(self._top_k).indices.tolist()) for later in after]


class Oracle:
    """What the next layers did choose, from a recorded trace: the upper line of every prefetcher.

    Args:
        trace: ``[T, L, K]`` experts of the tokens that will be decoded, in order.
        ahead: layers looked ahead; after the last comes the next token's first.
    """

    def __init__(self, trace: torch.Tensor, ahead: int = 1):
        self.ahead = ahead
        self._layers = trace.shape[1]
        self._chosen = trace.flatten(0, 1).tolist()
        self._token = -1

    def observe(self, layer: int, ids: list[int]) -> None:
        self._token += layer == 0

    def predict(self, layer: int, gate_input: torch.Tensor) -> list[Prediction]:
        place = self._token * self._layers + layer + 1
        known = self._chosen[place : place + self.ahead]
        return [((place + i) % self._layers, experts) for i, experts in enumerate(known)]


def lands_in_time(
    queued_bytes: int, page_bytes: int, bytes_per_second: float, latency: float, needed_in: float
) -> bool:
    """Whether a page asked for now is expected to land before it is needed.

    Args:
        queued_bytes: that the link has still to move, all of them before this page.
        page_bytes: of the page.
        bytes_per_second: of the link, as measured.
        latency: seconds a page takes besides.
        needed_in: seconds until its layer asks for it.
    """
    return (queued_bytes + page_bytes) / bytes_per_second + latency <= needed_in
