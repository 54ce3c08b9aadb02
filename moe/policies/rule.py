"""What a system's file says of it: its functions, and the parameter that a user gives."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from numbers import Real

from cachemoe.offload.errors import InputError

GATE, TOKEN = "gate", "token"
EXACT = "exact"
ROUTING_CHANGED = "routing changed"
PRECISION_CHANGED = "precision changed"
EXPERTS_CHANGED = "experts changed"


@dataclass(frozen=True)
class Parameter:
    """What a user gives a rule: a number, as in ``cache-prior:0.5``, or one of some words.

    Args:
        symbol: as written in the paper.
        number: int or float; str for a word.
        bounds: (E, K) -> the least and the greatest.
        words: that there are.
    """

    symbol: str
    number: type
    bounds: Callable[[int, int], tuple[float, float]] = lambda experts, top_k: (0.0, 0.0)
    words: tuple[str, ...] = ()

    def example(self, experts: int, top_k: int) -> str:
        """A value that may be."""
        if self.words:
            return self.words[0]
        return str(max(self.bounds(experts, top_k)[1], 1) if self.number is int else 0.5)

    def check(self, name: str, value: float | str | None, experts: int, top_k: int) -> None:
        """Whether the rule of that name can have the value.

        Raises:
            InputError: if not.
        """
        if self.words:
            if value not in self.words:
                raise InputError(f"{self.symbol} of {name} is {', '.join(self.words)}, not {value!r}")
            return
        low, high = self.bounds(experts, top_k)
        if not isinstance(value, Real) or (self.number is int and value != value // 1):
            what = "a whole number" if self.number is int else "a number"
            raise InputError(f"{self.symbol} of {name} must be {what}, not {value!r}")
        if not low <= value <= high:
            raise InputError(f"{self.symbol} of {name} must lie between {low} and {high}, not {value}")


@dataclass(frozen=True)
class Rule:
    """A routing policy before a user's numbers.

    Args:
        name: that a user types.
        key, grade: see :class:`cachemoe.kernels.policy.Policy`.
        parameter: None for a rule without.
        second: another number, not below the first, as in ``hobbit:0.6:0.9``; None for a rule without.
        places: (value, K, E) -> experts chosen for a token, of which the grade may drop some; None: K.
        knob_a: (value) -> the knob ``a``.
        knob_b: (value, K) -> the knob ``b``; of the second number where there is one.
        thresholds: (calibration, value) -> ``[L]``, the knob ``a`` of each layer in place of ``knob_a``'s.
        offsets: (calibration, value) -> ``[L, E]``, added to what experts are selected by; None: nothing.
        table: (calibration, value, E) -> ``[L, E]``, or ``[E]`` for all layers, the word ``table``.
        swaps, renormalises: see ``Policy``.
        cheaper: levels beside full precision that it asks for.
        share: of the pool's bytes, that those levels have.
        resident: whether the cheaper level is in memory whole, beside the pool, as surrogates of some rank.
        evict: (calibration, L, K) -> eviction policy; None: the user's.
        shared: whether the layers share one cache.
        forecasts: whether what the source says of the next layers, as many as the value is, keeps their experts there.
        function: of the scores, in place of the model's; they are the weights as they are.
        calibrated: whether its table or eviction policy asks the calibration.
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
    second: Parameter | None = None
    places: Callable[[float | None, int, int], int] | None = None
    knob_a: Callable[[float | None], float] = lambda value: value or 0.0
    knob_b: Callable[[float | None, int], float] = lambda value, top_k: 0.0
    thresholds: Callable | None = None
    offsets: Callable | None = None
    table: Callable | None = None
    swaps: bool = False
    renormalises: bool = True
    cheaper: int = 0
    share: float = 0.0
    resident: bool = False
    evict: Callable | None = None
    shared: bool = False
    forecasts: bool = False
    calibrated: bool = False
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
        return self.calibrated or self.thresholds is not None or self.offsets is not None or self.source == TOKEN

    @property
    def prefetches(self) -> bool:
        """Whether experts are fetched ahead, and chosen otherwise."""
        return self.source is not None and not self.decides
