"""What a system's file says of it: its functions, and the parameter that a user gives."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Parameter:
    """The number that a user gives a rule, as in ``cache-prior:0.5``; the key's knob ``a``.

    Args:
        symbol: as written in the paper.
        number: int or float.
        bounds: (E, K) -> the least and the greatest.
    """

    symbol: str
    number: type
    bounds: Callable[[int, int], tuple[float, float]]


@dataclass(frozen=True)
class Rule:
    """A routing policy before a user's numbers.

    Args:
        name: that a user types.
        key: see :class:`cachemoe.kernels.policy.Policy`.
        parameter: None for a rule without.
        experts_used: (value, K) -> experts a token, K or fewer.
        is_exact: (value) -> whether it can only choose what the model would.
    """

    name: str
    key: Callable | None = None
    parameter: Parameter | None = None
    experts_used: Callable[[float | None, int], int] = lambda value, top_k: top_k
    is_exact: Callable[[float | None], bool] = lambda value: False
