"""What a system's file says of it: its functions, and the parameter that a user gives."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature

GATE, TOKEN = "gate", "token"
EXACT = "exact"
ROUTING_CHANGED = "routing changed"
PRECISION_CHANGED = "precision changed"
EXPERTS_CHANGED = "experts changed"


@dataclass(frozen=True)
class Parameter:
    """The number that a user gives a rule, as in ``cache-prior:0.5``.

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
        key, grade: see :class:`cachemoe.kernels.policy.Policy`.
        parameter: None for a rule without.
        places: (value, K, E) -> experts chosen for a token, of which the grade may drop some; None: K.
        knob_a: (value) -> the knob ``a``.
        knob_b: (value, K) -> the knob ``b``.
        thresholds: (calibration, value) -> ``[L]``, the knob ``a`` of each layer in place of ``knob_a``'s.
        offsets: (calibration, value) -> ``[L, E]``, added to what experts are selected by; None: nothing.
        function: of the scores, in place of the model's; they are the weights as they are.
        by_logits: whether it fits only models that select by the logits of a softmax.
        decode_only: whether ``load`` leaves prompts alone.
        source: what says ahead of a layer which experts it will choose: ``gate``, its gate on the input of the layer
            before, or ``token``, a calibration's table by token id; None: nothing.
        decides: whether that routes the layer; else it is only fetched ahead.
        is_exact: (value) -> whether it can only choose what the model would.
        changes: what it changes otherwise.
    """

    name: str
    key: Callable | None = None
    grade: Callable | None = None
    parameter: Parameter | None = None
    places: Callable[[float | None, int, int], int] | None = None
    knob_a: Callable[[float | None], float] = lambda value: value or 0.0
    knob_b: Callable[[float | None, int], float] = lambda value, top_k: 0.0
    thresholds: Callable | None = None
    offsets: Callable | None = None
    function: str | None = None
    by_logits: bool = False
    decode_only: bool = False
    source: str | None = None
    decides: bool = False
    is_exact: Callable[[float | None], bool] = lambda value: False
    changes: str = ROUTING_CHANGED

    @property
    def sees_cost(self) -> bool:
        """Whether it asks what an absent expert costs."""
        return any("cost" in signature(function).parameters for function in (self.key, self.grade) if function)

    @property
    def needs_calibration(self) -> bool:
        """Whether it does nothing without."""
        return self.thresholds is not None or self.offsets is not None or self.source == TOKEN

    @property
    def prefetches(self) -> bool:
        """Whether experts are fetched ahead, and chosen otherwise."""
        return self.source is not None and not self.decides
