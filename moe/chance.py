"""As much by chance: what stands beside a policy that drops experts, swaps them, or has them compute cheaply.

A policy that changes what the model hardly notices looks good even if it chooses blindly. So the same text is run with
as many selections dropped, swapped and cheapened as the policy had, chosen as ``random-drop``, ``random-swap`` and
``random-cheap`` choose. The best J places of a policy that keeps them are kept, and the best one of a policy that swaps
for residents. Weights are the model's own, of what runs or of its own K, as the policy says; experts that a policy runs
beside the model's K have no counterpart. No cache takes part: a resident better page would serve some of the cheap
selections, and the control would have fewer than the policy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cachemoe.kernels import reference_route
from cachemoe.kernels.reference_route import gate_scores, gate_weights
from cachemoe.kernels.state import Routing
from cachemoe.moe.policies import random_cheap, random_drop, random_swap
from cachemoe.moe.policies.rule import EXACT
from cachemoe.moe.routers import RoutingRule, own_choice
from cachemoe.moe.shape import MoeShape
from cachemoe.moe.strategies import Strategy, kept
from cachemoe.moe.swap import RouteLayer

CONTROLS = (random_drop.RULE, random_swap.RULE, random_cheap.RULE)


def has_control(strategy: Strategy) -> bool:
    """Whether there is something to compare a strategy with: it changes which experts run, with the model's weights."""
    return strategy.label != EXACT and strategy.rule not in CONTROLS and strategy.rule.function is None


@dataclass(frozen=True)
class Changes:
    """What a policy did to the model's own selections, K a token and layer; each a count.

    Args:
        selections: the model's own.
        runs: experts that ran.
        swaps: of these, such as ran in the place of one of the model's own K, and not beside all of them.
        drops: of the model's own, those that did not run and for which none ran.
        cheap: experts that ran, in another place than the best, at a cheaper level than full precision.
        cheap_best: likewise in the best place.
    """

    selections: int = 0
    runs: int = 0
    swaps: int = 0
    drops: int = 0
    cheap: int = 0
    cheap_best: int = 0

    def __add__(self, other: "Changes") -> "Changes":
        return Changes(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def nothing(self) -> bool:
        """Whether all of the model's own experts ran, at full precision."""
        return not (self.swaps or self.drops or self.cheap or self.cheap_best)

    def chances(self, top_k: int, spared: int) -> tuple[float, float, float, float]:
        """How likely a place is to be dropped, swapped, and cheapened, and the best place to be cheapened.

        Args:
            top_k: K.
            spared: J, the best places that are never swapped.
        """
        total, tokens = max(self.selections, 1), max(self.selections / top_k, 1)
        rest = max(total - tokens, 1)  # of one expert a token there is no other place
        dropped = min(self.drops / rest, 1.0)
        swapped = 0.0
        if spared < top_k and dropped < 1:  # an expert that is swapped in may then be dropped, and is no swap
            swapped = self.swaps / total * top_k / (top_k - spared) / (1 - dropped)
        return dropped, min(swapped, 1.0), min(self.cheap / rest, 1.0), min(self.cheap_best / tokens, 1.0)


def changes_of(ids: torch.Tensor, levels: torch.Tensor, own: torch.Tensor) -> list[Changes]:
    """What B rows of tokens had changed.

    Args:
        ids: ``[B, T, places]`` the experts chosen.
        levels: ``[B, T, places]`` the level that each ran at; -1 where it did not.
        own: ``[B, T, K]`` the model's own.
    """
    ran, cheap = levels >= 0, levels > 0
    others = (ran & (ids[..., None] != own[..., None, :]).all(-1)).sum(-1)
    absent = own.shape[-1] - (ran.sum(-1) - others)
    swaps = torch.minimum(others, absent)
    counts = (ran, (1, 2)), (swaps, 1), (absent - swaps, 1), (cheap[..., 1:], (1, 2)), (cheap[..., :1], (1, 2))
    sums = torch.stack([each.sum(dims) for each, dims in counts], 1)
    return [Changes(own[0].numel(), *row) for row in sums.tolist()]


class Counted:
    """A route for ``Swap``, of B rows of tokens, that counts what it changes and misses.

    Attributes:
        of_prompts, of_decode: what each row had changed, by calls of several tokens a row, and of one.
        missed: of each row the pages, and those of a cheaper level among them.
    """

    def __init__(
        self, route: RouteLayer, levels_of: Callable, rules: Sequence[RoutingRule], shape: MoeShape, rows: int
    ):
        self._route, self._levels_of, self._rules, self._shape = route, levels_of, rules, shape
        self.of_prompts, self.of_decode = [Changes()] * rows, [Changes()] * rows
        self.missed = [(0, 0)] * rows

    @property
    def changes(self) -> list[Changes]:
        """Of all calls."""
        return [a + b for a, b in zip(self.of_prompts, self.of_decode, strict=True)]

    def route(self, layer: int, logits: torch.Tensor, hidden: torch.Tensor) -> Routing:
        routing = self._route(layer, logits, hidden)
        own = own_choice(self._rules[layer], logits.cpu(), self._shape.top_k)[0]
        own = own.unflatten(0, (len(self.missed), -1))
        counts = self.of_prompts if own.shape[1] > 1 else self.of_decode
        for row, changes in enumerate(changes_of(routing.ids, self._levels_of(routing.slots), own)):
            counts[row] += changes
        cheap = (routing.misses.pages >= self._shape.experts).sum(1).tolist()
        for row, count in enumerate(routing.misses.count.tolist()):
            self.missed[row] = self.missed[row][0] + count, self.missed[row][1] + cheap[row]
        return routing


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
        self._spared = [kept(s.top_j, top_k) if rule.key else 1 if rule.swaps else 0 for s in strategies]
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def set(self, of_prompts: Sequence[Changes], of_decode: Sequence[Changes]) -> None:
        """From now on as much as each row's policy changed, in calls of several tokens a row, and of one."""
        self._of_prompts, self._of_decode = (
            torch.tensor([each.chances(self._top_k, j) for each, j in zip(changes, self._spared, strict=True)])
            for changes in (of_prompts, of_decode)
        )

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
        ranked, _ = reference_route.own_choice(logits, experts, rule.scores, rule.correction)
        ranked = ranked.unflatten(0, (rows, -1))
        chances = self._of_prompts if ranked.shape[1] > 1 else self._of_decode
        dropped, swapped, cheap, cheap_best = chances.T[:, :, None, None]
        rank = torch.arange(experts).float()
        key = random_swap.key(rank, self._draw(ranked), swapped, float(k))
        key = torch.where(rank < torch.tensor(self._spared)[:, None, None], 3.0, key)
        key = torch.where(rank < rule.scores.top_groups * (experts // rule.scores.groups), key, -1.0)  # others may not
        ids = ranked.gather(-1, key.topk(k).indices.sort(-1).values)

        drawn = self._draw(ids)
        levels = random_drop.grade(drawn, dropped)
        levels = torch.where(levels < 0, levels, random_cheap.grade(drawn, dropped + cheap))  # a place is not both
        levels[..., :1] = random_cheap.grade(drawn[..., :1], cheap_best)

        scores = gate_scores(logits, rule.scores).unflatten(0, (rows, -1))
        ran = scores.gather(-1, ids).masked_fill(levels < 0, 0.0)
        weights = gate_weights(ran, rule.scores, ran if self._renormalises else scores.gather(-1, ranked[..., :k]))
        if rule.weigh is not None:
            weights = rule.weigh(logits, ids.flatten(0, 1)).view_as(weights).masked_fill(levels < 0, 0.0)
        routing = Routing.all_hits(ids, weights)
        routing.slots = levels.long()
        return routing

    def _draw(self, like: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.rand(like.shape[1:], generator=each) for each in self._generators])
