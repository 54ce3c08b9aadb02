"""Who chooses in a model's place: a strategy by the rules of the model's routers, with an eviction policy."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from cachemoe.kernels.route_cpu import peek
from cachemoe.kernels.state import Routing
from cachemoe.moe.routers import RoutingRule, choose
from cachemoe.moe.strategies import Strategy, policy_of


class Chooser:
    """Routes the layers of a model in B caches each, by one strategy or by several of one name.

    Args:
        rules: of each layer's router.
        top_k: K of the model.
        strategies: of the B caches.
        evict: eviction policy.
        device: where the logits and the state are.

    Attributes:
        knobs: ``[L, B, len(KNOBS)]``, what the layers' policies read: what is written here counts from the next call,
            or replay of a graph. None for a strategy that has none.
    """

    def __init__(
        self,
        rules: Sequence[RoutingRule],
        top_k: int,
        strategies: Sequence[Strategy],
        evict: Callable,
        device: torch.device | str = "cpu",
    ):
        self._rules, self._evict, self._top_k = [rule.to(device) for rule in rules], evict, top_k
        self._policies = [policy_of(*strategies, top_k=top_k, layer=layer) for layer in range(len(rules))]
        self.knobs = None
        if self._policies[0].knobs is not None:
            self.knobs = torch.stack([policy.knobs for policy in self._policies]).to(device)
            pairs = zip(self._policies, self.knobs, strict=True)
            self._policies = [replace(policy, knobs=knobs) for policy, knobs in pairs]

    def route(self, layer: int, logits: torch.Tensor, state, out: Routing | None = None) -> Routing:
        """Choose for T tokens, stepped; ``state`` is updated.

        Args:
            logits: ``[B, T, E]``.
            state: the layer's ``Residency`` of B caches.
            out: to be filled in; None for a new one.
        """
        return choose(self._rules[layer], logits, state, self._evict, self._top_k, self._policies[layer], out)

    def peek(self, layer: int, logits: torch.Tensor, state) -> list[int]:
        """What ``route`` would run for one token of one cache on the CPU, the best first; nothing is updated.

        Args:
            logits: ``[E]``.
        """
        rule = self._rules[layer]
        return peek(logits, state, self._top_k, self._policies[layer], rule.scores, rule.correction)
