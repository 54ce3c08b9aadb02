"""A prefetcher that has counted which experts follow those of the two layers before (EdgeMoE, arXiv 2308.14352)."""

from collections import Counter, defaultdict

import torch

from cachemoe.offload.prefetch import Prediction

Chosen = frozenset[int]


class History:
    """The next layer is expected to choose what it most often chose after these experts in the two layers before it.

    Where a pair of choices has not been seen, the last layer's alone tells; where that has not been seen either, how
    often the next layer chose each expert. A layer's choice is the set of its experts, whatever their weights. Before
    the first layers come the last ones, of the token before.

    Args:
        trace: ``[T, L, K]`` integers, the experts of consecutive tokens of a profiling text; K of a layer are named.
    """

    ahead = 1

    def __init__(self, trace: torch.Tensor):
        _, self._layers, top_k = trace.shape
        choices = trace.flatten(0, 1).tolist()
        keys = [frozenset(choice) for choice in choices]
        counts: dict[tuple, Counter[int]] = defaultdict(Counter)
        for place, choice in enumerate(choices):
            layer = place % self._layers
            for key in _keys(keys[place - 2] if place > 1 else None, keys[place - 1] if place > 0 else None):
                counts[layer, key].update(choice)
        self._likeliest = {
            known: [e for e, _ in sorted(count.items(), key=lambda item: (-item[1], item[0]))[:top_k]]
            for known, count in counts.items()
        }
        self._before: Chosen | None = None
        self._last: Chosen | None = None

    def observe(self, layer: int, ids: list[int]) -> None:
        self._before, self._last = self._last, frozenset(ids)

    def predict(self, layer: int, gate_input: torch.Tensor) -> list[Prediction]:
        later = (layer + 1) % self._layers
        for key in _keys(self._before, self._last):
            if (experts := self._likeliest.get((later, key))) is not None:
                return [(later, experts)]
        return []


def _keys(before: Chosen | None, last: Chosen | None) -> list[tuple[Chosen, ...]]:
    """What is looked up, the most telling first: the choices of two layers, of the last, of none."""
    known = [] if last is None else [(last,)]
    if last is not None and before is not None:
        known.insert(0, (before, last))
    return [*known, ()]
