"""Routing strategies by name: what a user types, checked, and turned into what ``route`` takes.

``original`` · ``pruning:K'`` · ``max-rank:M`` · ``cumsum:p`` · ``cache-prior:lambda``, after Skliar et al. (arXiv
2412.00099); the rules themselves are in :mod:`cachemoe.kernels.reference`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cachemoe.kernels.reference import CacheBias
from cachemoe.offload.errors import InputError

EXACT = "exact"
ROUTING_CHANGED = "routing changed"

# name -> (the parameter as written in the paper, how to read it, its range for E experts and K used, the field of
# CacheBias that it sets if any)
RULES = {
    "original": (None, None, None, None),
    "pruning": ("K'", int, lambda experts, top_k: (1, top_k - 1), None),
    "max-rank": ("M", int, lambda experts, top_k: (1, experts), "window"),
    "cumsum": ("p", float, lambda experts, top_k: (0.001, 1.0), "mass"),
    "cache-prior": ("lambda", float, lambda experts, top_k: (0.0, 1.0), "prior"),
}


@dataclass(frozen=True)
class Strategy:
    """A routing strategy and its parameter.

    Args:
        name: one of ``original``, ``pruning``, ``max-rank``, ``cumsum``, ``cache-prior``.
        value: None for ``original``; K' < K experts a token for ``pruning``; M for ``max-rank``; p in [0.001, 1] for
            ``cumsum``; lambda in [0, 1] for ``cache-prior``.
    """

    name: str
    value: float | None = None

    @classmethod
    def parse(cls, text: str, experts: int, top_k: int) -> "Strategy":
        """Read ``name`` or ``name:value`` for a model of E experts, K of them used.

        Raises:
            InputError: for an unknown name or a value out of range.
        """
        name, colon, value_text = text.partition(":")
        if name not in RULES:
            raise InputError(f"unknown strategy {name!r}: choose among {', '.join(RULES)}")
        parameter, number, bounds, _ = RULES[name]
        if parameter is None:
            if colon:
                raise InputError(f"{name} takes no value, and {text!r} gives one")
            return cls(name)
        if name == "pruning" and top_k == 1:
            raise InputError("pruning needs a model that uses more than one expert a token, and this one uses one")
        low, high = bounds(experts, top_k)
        try:
            value = number(value_text)
        except ValueError as error:
            raise InputError(f"{name} needs its {parameter}, as in {name}:{high}, not {text!r}") from error
        if not low <= value <= high:
            raise InputError(f"{parameter} of {name} must lie between {low} and {high}, not {value}")
        return cls(name, value)

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}:{str(self.value).removesuffix('.0')}"

    @property
    def label(self) -> str:
        """``exact`` if the strategy can only choose what the model would, else ``routing changed``."""
        return EXACT if self.name == "original" or (self.name == "cache-prior" and self.value == 0) else ROUTING_CHANGED

    def experts_used(self, top_k: int) -> int:
        """K, or the fewer that pruning leaves."""
        return int(self.value) if self.name == "pruning" else top_k


def cache_bias(strategies: Sequence[Strategy], top_j: int) -> CacheBias:
    """The strategies of B caches as one ``CacheBias``, of numbers where B is 1.

    Args:
        top_j: J, the best-ranked experts that every strategy keeps.
    """
    values = {}
    for *_, field in RULES.values():
        if field and any(RULES[s.name][-1] == field for s in strategies):
            each = [s.value if RULES[s.name][-1] == field else 0 for s in strategies]
            values[field] = torch.tensor(each) if len(each) > 1 else each[0]
    return CacheBias(top_j=top_j, **values)
