"""Who chooses in a model's place: a strategy by the rules of the model's routers, with an eviction policy."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from cachemoe.kernels.policy import ORIGINAL, Policy
from cachemoe.kernels.route_cpu import peek
from cachemoe.kernels.state import Routing
from cachemoe.moe.calibration import Calibration
from cachemoe.moe.policies.naee_prune import ABSENT
from cachemoe.moe.routers import RoutingRule, choose
from cachemoe.moe.strategies import Strategy, policy_of
from cachemoe.offload.errors import InputError


class Chooser:
    """Routes the layers of a model in B caches each, by one strategy or by several of one name.

    Args:
        rules: of each layer's router.
        top_k: K of the model.
        strategies: of the B caches, with the same number of places.
        evict: eviction policy.
        device: where the logits and the state are.
        calibration: of the model, for rules that need it.
        miss_cost: see ``policy_of``.
        gates_prompts: whether calls of many tokens are gated by a rule of decode alone too.

    Attributes:
        miss_cost: as given.
        places: experts chosen a token, of which some may be dropped.
        knobs: ``[L, B, len(KNOBS)]``, what the layers' policies read: what is written here counts from the next call,
            or replay of a graph. None for a strategy that has none.

    Raises:
        InputError: if a rule's calibration is missing, or a model cannot be routed so.
    """

    def __init__(
        self,
        rules: Sequence[RoutingRule],
        top_k: int,
        strategies: Sequence[Strategy],
        evict: Callable,
        device: torch.device | str = "cpu",
        calibration: Calibration | None = None,
        miss_cost: float = 0.0,
        gates_prompts: bool = True,
    ):
        self._evict, self._rule = evict, strategies[0].rule
        self.miss_cost = miss_cost
        experts = 0 if calibration is None else calibration.removal.shape[1]
        self._known = {"top_k": top_k, "calibration": calibration, "miss_cost": miss_cost, "experts": experts}
        if self._rule.by_logits and not all(_selects_by_logits(rule) for rule in rules):
            raise InputError(f"the model selects by more than its logits, which {self._rule.name} would leave out")
        self._policies = self._policies_of(strategies, len(rules))
        self._leaves_prompts = self._rule.decode_only and not gates_prompts
        self._rules, self._offsets = [each.to(device) for each in rules], None
        in_groups = (each.scores.top_groups * (experts // each.scores.groups) or top_k for each in rules)
        self.places = min(strategies[0].places(experts, top_k), *in_groups)
        if self._rule.offsets is not None:
            self._shift([self._rule.offsets(calibration, s.value) for s in strategies], self._rule.function, device)
        self.knobs = None
        if self._policies[0].knobs is not None:
            self.knobs = torch.stack([policy.knobs for policy in self._policies]).to(device)
            pairs = zip(self._policies, self.knobs, strict=True)
            self._policies = [replace(policy.to(device), knobs=knobs) for policy, knobs in pairs]

    def retune(self, strategies: Sequence[Strategy]) -> bool:
        """Go on by other strategies if they differ in knobs alone; whether they do.

        Args:
            strategies: of the B caches.
        """
        new = self._policies_of(strategies, len(self._policies))
        same = strategies[0].rule is self._rule and new[0].bounded == self._policies[0].bounded
        if self.knobs is None or not same or self._rule.offsets or self._rule.table:
            return False
        self.knobs.copy_(torch.stack([policy.knobs for policy in new]))
        return True

    def _policies_of(self, strategies: Sequence[Strategy], layers: int) -> list[Policy]:
        return [policy_of(*strategies, layer=layer, **self._known) for layer in range(layers)]

    def _shift(self, offsets: list[torch.Tensor], function: str | None, device) -> None:
        """Have ``[L, E]`` offsets of each cache added to what is selected by: logits, or their scores' correction."""
        every_layer = torch.stack(offsets, 1).to(device)  # [L, B, E]
        for rule, each in zip(self._rules, every_layer, strict=True):
            _check_groups(rule, each > ABSENT, self._known["top_k"])
        if function is not None:
            scores = [replace(rule.scores, function=function, renormalise=False, scale=1.0) for rule in self._rules]
            self._rules = [replace(rule, scores=each) for rule, each in zip(self._rules, scores, strict=True)]
        if any(rule.correction is not None for rule in self._rules):
            pairs = zip(self._rules, every_layer, strict=True)
            self._rules = [replace(rule, correction=(rule.correction + each).contiguous()) for rule, each in pairs]
        else:
            self._offsets = every_layer[:, :, None]

    def in_c(self, layer: int) -> dict | None:
        """What a ``layer_cpu.Router`` needs to choose as ``route`` does for one token; None where it could not."""
        rule = self._rules[layer]
        if self._offsets is not None or rule.weigh is not None:
            return None
        how = {"policy": self._policies[layer], "evict": self._evict, "top_k": self.places}
        return how | {"scores": rule.scores, "correction": rule.correction}

    def route(self, layer: int, logits: torch.Tensor, state, out: Routing | None = None) -> Routing:
        """Choose for T tokens, stepped; ``state`` is updated.

        Args:
            logits: ``[B, T, E]``.
            state: the layer's ``Residency`` of B caches.
            out: to be filled in; None for a new one.
        """
        if self._offsets is not None:
            logits = logits + self._offsets[layer]
        policy = ORIGINAL if self._leaves_prompts and logits.shape[1] > 1 else self._policies[layer]
        return choose(self._rules[layer], logits, state, self._evict, self.places, policy, out)

    def peek(self, layer: int, logits: torch.Tensor, state) -> list[int]:
        """The pages that ``route`` would run for one token of one cache on the CPU, the best first; nothing is updated.

        Args:
            logits: ``[E]``.
        """
        rule = self._rules[layer]
        if self._offsets is not None:
            logits = logits + self._offsets[layer, 0, 0]
        correction = rule.correction if rule.correction is None else rule.correction.flatten()
        return peek(logits, state, self.places, self._policies[layer], rule.scores, correction)


def _selects_by_logits(rule: RoutingRule) -> bool:
    return rule.scores.function == "softmax" and rule.correction is None and rule.weigh is None


def _check_groups(rule: RoutingRule, left: torch.Tensor, top_k: int) -> None:
    """Whether a token has K experts to choose from, whichever groups it takes; groups that are left too few come last.

    Args:
        left: ``[B, E]`` bool, experts that have not been removed.

    Raises:
        InputError: if not.
    """
    scores, experts = rule.scores, left.shape[-1]
    counts = left.unflatten(-1, (scores.groups, -1)).sum(-1)
    lacking = (2 if scores.group_score == "best-two" else 1) - counts
    fewest = (counts + (experts + 1) * lacking.clamp(min=0)).sort(-1).values[..., : scores.top_groups] % (experts + 1)
    if fewest.sum(-1).min() < top_k:
        raise InputError(f"some groups of experts would have too few left for the {top_k} of a token: remove fewer")
