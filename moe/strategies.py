"""Routing strategies by name: what a user types, checked, and turned into what ``route`` takes.

``original`` · ``pruning:K'`` · ``max-rank:M`` · ``cumsum:p`` · ``cache-prior:lambda``, after Skliar et al. (arXiv
2412.00099), and other systems'; the rules themselves are in :mod:`cachemoe.moe.policies`, a file each. After
``,max-regret=`` comes a bound of what one swap gives up, as in ``cache-prior:0.5,max-regret=0.01``.
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from cachemoe.kernels.policy import ORIGINAL, Policy
from cachemoe.moe.calibration import Calibration, missing
from cachemoe.moe.policies import RULES
from cachemoe.moe.policies.rule import EXACT, Rule
from cachemoe.offload.errors import InputError

REGRET = "max-regret"
TOP_J = 2  # the paper's choice for models of many small experts; of fewer than three used, all but one
UNBOUNDED = math.inf


@dataclass(frozen=True)
class Strategy:
    """A routing strategy and its parameters; ``CachePrior`` and the other functions below make one.

    Args:
        name: one of ``RULES``.
        value: of the rule's parameter; None where it has none.
        second: of its second parameter.
        top_j: J, the best-ranked experts that are always kept, fewer than K; None: two, or K - 1 where that is fewer.
        max_regret: a swap, of one of the model's own K experts for another, stays only where the score of the first
            exceeds that of the second by less: 0 is the model's own choice, infinity no bound.
    """

    name: str
    value: float | str | None = None
    top_j: int | None = None
    max_regret: float = UNBOUNDED
    second: float | None = None

    @classmethod
    def parse(cls, text: str, experts: int, top_k: int, top_j: int | None = None) -> "Strategy":
        """Read ``name``, ``name:value`` or ``name:value,max-regret=bound`` for a model of E experts, K of them used.

        Raises:
            InputError: for an unknown name or a value out of range.
        """
        text, *options = text.split(",")
        name, colon, value_text = text.partition(":")
        if name not in RULES:
            raise InputError(f"unknown strategy {name!r}: choose among {', '.join(RULES)}")
        rule, value, second = RULES[name], None, None
        if (parameter := rule.parameter) is not None:
            value_text, _, second_text = value_text.partition(":") if rule.second else (value_text, "", "")
            try:
                value = parameter.number(value_text)
                second = rule.second.number(second_text) if rule.second else None
            except ValueError as error:
                example, symbols = parameter.example(experts, top_k), parameter.symbol
                if rule.second:
                    example, symbols = (
                        f"{example}:{rule.second.example(experts, top_k)}",
                        f"{symbols} and {rule.second.symbol}",
                    )
                raise InputError(f"{name} needs its {symbols}, as in {name}:{example}, not {text!r}") from error
        elif colon:
            raise InputError(f"{name} takes no value, and {text!r} gives one")
        bound = UNBOUNDED
        if options:
            option, _, bound_text = options[0].partition("=")
            try:
                if option != REGRET or len(options) > 1:
                    raise ValueError
                bound = float(bound_text)
            except ValueError as error:
                given = ",".join(options)
                raise InputError(
                    f"after a comma comes {REGRET}=bound, as in {text},{REGRET}=0.01, not {given!r}"
                ) from error
        strategy = cls(name, value, top_j if rule.key else None, bound, second)
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
            parameter.check(self.name, self.value, experts, top_k)
            if (after := self.rule.second) is not None:
                after.check(self.name, self.second, experts, top_k)
                if self.second < self.value:
                    symbols = f"{parameter.symbol} of {self.name} must not exceed {after.symbol}"
                    raise InputError(f"{symbols}: {self.value} and {self.second}")
        elif self.value is not None:
            raise InputError(f"{self.name} takes no value, and {self.value!r} is one")
        j = kept(self.top_j, top_k)
        if not isinstance(j, Integral) or j < 0:
            raise InputError(f"J must be a whole number, 0 or more, not {j!r}")
        if j >= top_k:
            raise InputError(f"J must be less than the {top_k} experts of a token, not {j}: none could be another")
        if not isinstance(self.max_regret, Real) or not self.max_regret >= 0:
            raise InputError(f"{REGRET} must be a number, 0 or more, not {self.max_regret!r}")
        if self.max_regret != UNBOUNDED and self.rule.key is None:
            raise InputError(f"{self.name} swaps no expert for another, so that {REGRET} has nothing to bound")

    def __str__(self) -> str:
        text = ":".join([self.name, *(_number(each) for each in (self.value, self.second) if each is not None)])
        return text if self.max_regret == UNBOUNDED else f"{text},{REGRET}={_number(self.max_regret)}"

    @property
    def rule(self) -> Rule:
        return RULES[self.name]

    def check_calibration(self, calibration: Calibration | None) -> None:
        """Whether there is the calibration that the rule needs.

        Raises:
            InputError: if it is missing.
        """
        if self.rule.needs_calibration and calibration is None:
            raise missing(self.name)

    def places(self, experts: int, top_k: int) -> int:
        """Experts that are chosen for a token, of which a grade may drop some: K, or what the rule says."""
        return top_k if self.rule.places is None else self.rule.places(self.value, top_k, experts)

    def check_slots(self, slots: int, experts: int, top_k: int) -> None:
        """Whether so many slots of a layer hold all that a token may choose.

        Raises:
            InputError: if not.
        """
        if slots < (places := self.places(experts, top_k)):
            raise InputError(
                f"{self} may choose {places} experts for a token: a capacity of {slots} slots of a layer is too small"
            )

    @property
    def label(self) -> str:
        """``exact`` if the strategy can only choose what the model would, else what it changes."""
        exact = self.max_regret == 0 and self.rule.grade is None
        return EXACT if exact or self.rule.is_exact(self.value) else self.rule.changes


def kept(top_j: int | None, top_k: int) -> int:
    """J as given or, of none, what it is for a model of which a token uses K experts."""
    return min(TOP_J, top_k - 1) if top_j is None else top_j


def Original() -> Strategy:
    """The model's own top-K, whatever is resident."""
    return Strategy("original")


def Pruning(keep: int) -> Strategy:
    """The ``keep`` best experts alone, fewer than the model's K."""
    return Strategy("pruning", keep)


def MaxRank(window: int, top_j: int | None = None, max_regret: float = UNBOUNDED) -> Strategy:
    """Residents among the M = ``window`` best-ranked come first (the paper's algorithm 1)."""
    return Strategy("max-rank", window, top_j, max_regret)


def CumSum(mass: float, top_j: int | None = None, max_regret: float = UNBOUNDED) -> Strategy:
    """As max-rank, the window being the fewest experts whose probabilities sum to p = ``mass`` (its algorithm 2)."""
    return Strategy("cumsum", mass, top_j, max_regret)


def CachePrior(lam: float, top_j: int | None = None, max_regret: float = UNBOUNDED) -> Strategy:
    """Rank by logit + lambda * (mean range of logits) for residents: what the paper proposes."""
    return Strategy("cache-prior", lam, top_j, max_regret)


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


def policy_of(
    *strategies: Strategy,
    top_k: int | None = None,
    layer: int = 0,
    miss_cost: float = 0.0,
    calibration: Calibration | None = None,
    experts: int = 0,
) -> Policy:
    """The policy of a layer's B caches, one strategy each; all of one name, each with its own numbers.

    Args:
        top_k: K of the model, for rules, and strategies without a J of their own, that need it.
        layer: for rules that differ between layers.
        miss_cost: the logarithm of how many times as long as a resident's an absent expert's output takes.
        calibration: of the model, for rules that need it.
        experts: E, likewise.

    Raises:
        ValueError: for strategies of different names.
        InputError: if a rule's calibration is missing.
    """
    if len({s.name for s in strategies}) > 1:
        raise ValueError(f"one policy routes all caches, not {', '.join(sorted({s.name for s in strategies}))}")
    rule = strategies[0].rule
    strategies[0].check_calibration(calibration)
    if rule.key is None and rule.grade is None:
        return ORIGINAL
    rows = []
    for s in strategies:
        a = rule.knob_a(s.value) if rule.thresholds is None else float(rule.thresholds(calibration, s.value)[layer])
        b = rule.knob_b(s.second if rule.second else s.value, top_k)
        rows.append((kept(s.top_j, top_k) if rule.key else 0, a, b, miss_cost, s.max_regret, layer))
    bounded, table = any(s.max_regret != UNBOUNDED for s in strategies), None
    if rule.table is not None:
        tables = [rule.table(calibration, s.value, experts) for s in strategies]
        table = torch.stack([each if each.dim() == 1 else each[layer] for each in tables]).float().contiguous()
    knobs = torch.tensor(rows, dtype=torch.float32, device="cpu")
    return Policy(rule.key, rule.grade, bounded, knobs, table, rule.swaps, rule.renormalises)


def _number(value: float) -> str:
    return str(value).removesuffix(".0")
