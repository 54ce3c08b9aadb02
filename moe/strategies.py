"""Routing strategies by name: what a user types, checked, and turned into what ``route`` takes.

``original`` · ``pruning:K'`` · ``max-rank:M`` · ``cumsum:p`` · ``cache-prior:lambda``, after Skliar et al. (arXiv
2412.00099); the rules themselves are in :mod:`cachemoe.moe.policies`.
"""

from dataclasses import dataclass
from numbers import Integral, Real

import torch

from cachemoe.kernels.policy import ORIGINAL, Policy
from cachemoe.moe.policies import RULES
from cachemoe.moe.policies.rule import Rule
from cachemoe.offload.errors import InputError

TOP_J = 2  # the paper's choice for models of many small experts
EXACT = "exact"
ROUTING_CHANGED = "routing changed"
PRECISION_CHANGED = "precision changed"


@dataclass(frozen=True)
class Strategy:
    """A routing strategy and its parameters; ``CachePrior`` and the other functions below make one.

    Args:
        name: one of ``original``, ``pruning``, ``max-rank``, ``cumsum``, ``cache-prior``.
        value: None for ``original``; K' < K experts a token for ``pruning``; M for ``max-rank``; p in [0.001, 1] for
            ``cumsum``; lambda in [0, 1] for ``cache-prior``.
        top_j: J, the best-ranked experts that are always kept.
    """

    name: str
    value: float | None = None
    top_j: int = TOP_J

    @classmethod
    def parse(cls, text: str, experts: int, top_k: int, top_j: int = TOP_J) -> "Strategy":
        """Read ``name`` or ``name:value`` for a model of E experts, K of them used.

        Raises:
            InputError: for an unknown name or a value out of range.
        """
        name, colon, value_text = text.partition(":")
        if name not in RULES:
            raise InputError(f"unknown strategy {name!r}: choose among {', '.join(RULES)}")
        rule = RULES[name]
        if (parameter := rule.parameter) is None:
            if colon:
                raise InputError(f"{name} takes no value, and {text!r} gives one")
            return cls(name)
        try:
            value = parameter.number(value_text)
        except ValueError as error:
            high = max(parameter.bounds(experts, top_k)[1], 1)
            raise InputError(f"{name} needs its {parameter.symbol}, as in {name}:{high}, not {text!r}") from error
        strategy = cls(name, value, top_j) if rule.key else cls(name, value)
        strategy.check(experts, top_k)
        return strategy

    def check(self, experts: int, top_k: int) -> None:
        """Whether a model of E experts, K of them used, can be routed so.

        Raises:
            InputError: if not.
        """
        if self.name not in RULES:
            raise InputError(f"unknown strategy {self.name!r}: choose among {', '.join(RULES)}")
        if self.name == "pruning" and top_k == 1:
            raise InputError("pruning needs a model that uses more than one expert a token, and this one uses one")
        if (parameter := self.rule.parameter) is not None:
            low, high = parameter.bounds(experts, top_k)
            if not isinstance(self.value, Real) or (parameter.number is int and self.value != self.value // 1):
                what = "a whole number" if parameter.number is int else "a number"
                raise InputError(f"{parameter.symbol} of {self.name} must be {what}, not {self.value!r}")
            if not low <= self.value <= high:
                raise InputError(
                    f"{parameter.symbol} of {self.name} must lie between {low} and {high}, not {self.value}"
                )
        elif self.value is not None:
            raise InputError(f"{self.name} takes no value, and {self.value!r} is one")
        if not isinstance(self.top_j, Integral) or self.top_j < 0:
            raise InputError(f"J must be a whole number, 0 or more, not {self.top_j!r}")

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}:{str(self.value).removesuffix('.0')}"

    @property
    def rule(self) -> Rule:
        return RULES[self.name]

    @property
    def label(self) -> str:
        """``exact`` if the strategy can only choose what the model would, else ``routing changed``."""
        return EXACT if self.rule.is_exact(self.value) else ROUTING_CHANGED

    def experts_used(self, top_k: int) -> int:
        """K, or the fewer that pruning leaves."""
        return self.rule.experts_used(self.value, top_k)


def Original() -> Strategy:
    """The model's own top-K, whatever is resident."""
    return Strategy("original")


def Pruning(keep: int) -> Strategy:
    """The ``keep`` best experts alone, fewer than the model's K."""
    return Strategy("pruning", keep)


def MaxRank(window: int, top_j: int = TOP_J) -> Strategy:
    """Residents among the M = ``window`` best-ranked come first (the paper's algorithm 1)."""
    return Strategy("max-rank", window, top_j)


def CumSum(mass: float, top_j: int = TOP_J) -> Strategy:
    """As max-rank, the window being the fewest experts whose probabilities sum to p = ``mass`` (its algorithm 2)."""
    return Strategy("cumsum", mass, top_j)


def CachePrior(lam: float, top_j: int = TOP_J) -> Strategy:
    """Rank by logit + lambda * (mean range of logits) for residents: what the paper proposes."""
    return Strategy("cache-prior", lam, top_j)


def checked(routing: Strategy | str | None, experts: int, top_k: int) -> Strategy:
    """The strategy that a user means, for a model of E experts, K of them used.

    Args:
        routing: a strategy, its text as ``Strategy.parse`` reads it, or None: ``Original()``.

    Raises:
        InputError: if it is none of these, or the model cannot be routed so.
    """
    if isinstance(routing, str):
        return Strategy.parse(routing, experts, top_k)
    routing = Original() if routing is None else routing
    if not isinstance(routing, Strategy):
        raise InputError(f"a routing is a strategy such as CachePrior(0.5), or its text, not {routing!r}")
    routing.check(experts, top_k)
    return routing


def policy_of(*strategies: Strategy) -> Policy:
    """The policy of B caches, one strategy each; all of one name, each with its own numbers.

    Raises:
        ValueError: for strategies of different names.
    """
    if len({s.name for s in strategies}) > 1:
        raise ValueError(f"one policy routes all caches, not {', '.join(sorted({s.name for s in strategies}))}")
    if (key := strategies[0].rule.key) is None:
        return ORIGINAL
    return Policy(key, torch.tensor([[s.top_j, s.value] for s in strategies], dtype=torch.float32, device="cpu"))
