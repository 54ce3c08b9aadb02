"""As much by chance: what stands beside a policy that drops experts, swaps them, or has them compute cheaply.

A policy that changes what the model hardly notices looks good even if it chooses blindly. So the same text is run with
as many selections dropped, swapped and cheapened as the policy had, chosen as ``random-drop``, ``random-swap`` and
``random-cheap`` choose. The best J places, and the best place of a policy that spares it, are spared here too, and the
weights are made by the policy's rule. No cache takes part: a resident better page would serve some of the cheap
selections, and the control would have fewer than the policy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cachemoe.kernels.reference_route import gate_scores, gate_weights
from cachemoe.kernels.state import Routing
from cachemoe.moe.policies import random_cheap, random_drop, random_swap
from cachemoe.moe.policies.rule import EXACT
from cachemoe.moe.routers import RoutingRule, own_choice
from cachemoe.moe.strategies import Strategy

CONTROLS = (random_drop.RULE, random_swap.RULE, random_cheap.RULE)


def has_control(strategy: Strategy) -> bool:
    """Whether there is something to compare a strategy with."""
    return strategy.label != EXACT and strategy.rule not in CONTROLS


@dataclass(frozen=True)
class Changes:
    """What a policy did to the model's own selections, K a token and layer; each a count.

    Args:
        selections: the model's own.
        runs: experts that ran.
        swaps: of these, such as were not among the model's own K.
        cheap: of these, in another place than the best, at a cheaper level than full precision.
        cheap_best: likewise in the best place.
    """

    selections: int = 0
    runs: int = 0
    swaps: int = 0
    cheap: int = 0
    cheap_best: int = 0

    def __add__(self, other: "Changes") -> "Changes":
        return Changes(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def nothing(self) -> bool:
        """Whether the model's own experts ran at full precision, for all that counts tell."""
        return self.runs >= self.selections and not (self.swaps or self.cheap or self.cheap_best)

    def chances(self, top_k: int, spared: int) -> tuple[float, float, float, float]:
        """How likely a place is to be dropped, swapped, and cheapened, and the best place to be cheapened.

        Args:
            top_k: K.
            spared: J, the best places that are never swapped.
        """
        total, tokens = self.selections, self.selections / top_k
        rest = max(total - tokens, 1)  # of one expert a token there is no other place
        # Swaps are counted of those that run, and an expert that is swapped in may then be dropped.
        swapped = self.swaps / min(self.runs, total) * top_k / (top_k - spared) if spared < top_k else 0.0
        chances = (total - self.runs) / rest, swapped, self.cheap / rest, self.cheap_best / tokens
        return tuple(min(max(each, 0.0), 1.0) for each in chances)


def changes_of(ids: torch.Tensor, levels: torch.Tensor, own: torch.Tensor) -> list[Changes]:
    """What B rows of tokens had changed.

    Args:
        ids: ``[B, T, places]`` the experts chosen.
        levels: ``[B, T, places]`` the level that each ran at; -1 where it did not.
        own: ``[B, T, K]`` the model's own.
    """
    others = (ids[..., None] != own[..., None, :]).all(-1)
    ran, cheap = levels >= 0, levels > 0
    counts = ran, ran & others, cheap[..., 1:], cheap[..., :1]
    return [Changes(own[0].numel(), *row) for row in torch.stack([each.sum((1, 2)) for each in counts], 1).tolist()]


class Chance:
    """Chooses in a model's place, for B rows of tokens, what is dropped, swapped and cheapened by chance.

    Args:
        rules: of each layer's router.
        top_k: K of the model.
        strategies: whose control each row is, all of one name.
        seeds: of what is drawn for each row; no row's draws depend on another's.
    """

    def __init__(self, rules: Sequence[RoutingRule], top_k: int, strategies: Sequence[Strategy], seeds: Sequence[int]):
        rule = strategies[0].rule
        self._rules, self._top_k, self._renormalises = rules, top_k, rule.renormalises
        self._spared = [s.top_j if rule.key else 1 if rule.swaps else 0 for s in strategies]
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def set(self, changes: Sequence[Changes]) -> None:
        """From now on as much as each row's policy changed."""
        chances = [each.chances(self._top_k, j) for each, j in zip(changes, self._spared, strict=True)]
        self._dropped, self._swapped, self._cheap, self._cheap_best = torch.tensor(chances).T[:, :, None, None]

    @staticmethod
    def levels_of(slots: torch.Tensor) -> torch.Tensor:
        """The levels that its routings have in place of slots."""
        return slots

    def route(self, layer: int, logits: torch.Tensor, _=None) -> Routing:
        """As ``Swap`` asks for it; the slots of the ``Routing`` are levels, -1 where dropped.

        Args:
            logits: ``[S, E]`` of S = B * T tokens.
        """
        rule, k = self._rules[layer], self._top_k
        logits, rows = logits.cpu().float(), len(self._generators)
        experts = logits.shape[1]
        ranked = own_choice(rule, logits, experts)[0].unflatten(0, (rows, -1))
        rank = torch.arange(experts).float()
        key = random_swap.key(rank, self._draw(ranked), self._swapped, float(k))
        key = torch.where(rank < torch.tensor(self._spared)[:, None, None], 3.0, key)
        key = torch.where(rank < rule.scores.top_groups * (experts // rule.scores.groups), key, -1.0)  # others may not
        ids = ranked.gather(-1, key.topk(k).indices.sort(-1).values)

        drawn = self._draw(ids)
        levels = random_drop.grade(drawn, self._dropped)
        # Of one draw, since a place is not both.
        cheap = random_cheap.grade(drawn, self._dropped + self._cheap)
        levels = torch.where(levels < 0, levels, cheap)
        levels[..., :1] = random_cheap.grade(drawn[..., :1], self._cheap_best)

        scores = gate_scores(logits, rule.scores).unflatten(0, (rows, -1))
        ran = scores.gather(-1, ids).masked_fill(levels < 0, 0.0)
        weights = gate_weights(ran, rule.scores, ran if self._renormalises else scores.gather(-1, ranked[..., :k]))
        if rule.weigh is not None:
            own = rule.weigh(logits, ids.flatten(0, 1)).view_as(weights)
            weights = own.masked_fill(levels < 0, 0.0)
        routing = Routing.all_hits(ids, weights)
        routing.slots = levels.long()
        return routing

    def _draw(self, like: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.rand(like.shape[1:], generator=each) for each in self._generators])
