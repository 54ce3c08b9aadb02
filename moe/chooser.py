"""Who chooses in a model's place: a strategy by the rules of the model's routers, with an eviction policy."""

from collections.abc import Callable, Sequence

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
        top_k: experts that a token uses, K or the fewer that pruning leaves.
        policy: of every layer. What is written into its knobs counts from the next call, or replay of a graph.
    """

    def __init__(
        self,
        rules: Sequence[RoutingRule],
        top_k: int,
        strategies: Sequence[Strategy],
        evict: Callable,
        device: torch.device | str = "cpu",
    ):
        self.top_k = strategies[0].experts_used(top_k)
        self.policy = policy_of(*strategies).to(device)
        self._rules, self._evict = [rule.to(device) for rule in rules], evict

    def route(self, layer: int, logits: torch.Tensor, state, out: Routing | None = None) -> Routing:
        """Choose for T tokens, stepped; ``state`` is updated.

        Args:
            logits: ``[B, T, E]``.
            state: the layer's ``Residency`` of B caches.
            out: to be filled in; None for a new one.
        """
        return choose(self._rules[layer], logits, state, self._evict, self.top_k, self.policy, out)

    def peek(self, layer: int, logits: torch.Tensor, state) -> list[int]:
        """What ``route`` would choose for one token of one cache on the CPU, the best first; nothing is updated.

        Args:
            logits: ``[E]``.
        """
        rule = self._rules[layer]
        return peek(logits, state, self.top_k, self.policy, rule.scores, rule.correction)
