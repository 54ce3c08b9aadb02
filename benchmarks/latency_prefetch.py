"""Prefetchers by name, as ``cachemoe latency --prefetch`` takes them."""

from collections.abc import Callable, Sequence

import torch

from cachemoe.moe.strategies import Strategy
from cachemoe.offload.engine import OffloadEngine
from cachemoe.offload.errors import InputError
from cachemoe.offload.history import History
from cachemoe.offload.prefetch import Frequency, NextLayerGate, Oracle, Prefetcher, PreviousToken

NO_PREFETCH = "none"
ORACLE = "oracle"
GATE = "gate"
STACKED = "stacked"
ADMISSION = "admission"  # asks for nothing ahead: what gave way or ran cheaply is fetched when the link is idle
PREFETCHERS = (NO_PREFETCH, GATE, STACKED, "previous", "frequency", "history", ORACLE, ADMISSION)


def make_prefetcher(
    name: str,
    engine: OffloadEngine,
    routers: Sequence[torch.Tensor],
    choose: Callable[[int, torch.Tensor], list[int]],
    top_k: int,
    ahead: int,
    trace: torch.Tensor | None,
    profiled: torch.Tensor,
) -> Prefetcher | None:
    """A prefetcher that knows nothing yet.

    Args:
        name: one of ``PREFETCHERS``, or ``gate:N``: of what the gate expects, the N likeliest.
        engine: which will use it.
        routers: ``[E, H]`` of each layer.
        choose: (layer, ``[E]`` logits) -> what the routing in use would choose.
        top_k: K.
        ahead: layers looked ahead.
        trace: ``[T, L, K]`` what the unmodified model chooses for the tokens to come; for the oracle alone.
        profiled: ``[T, L, K]`` what it has chosen for tokens before.
    """
    layers = len(routers)
    name, _, likeliest = name.partition(":")
    count = int(likeliest or top_k)
    makers = {
        NO_PREFETCH: lambda: None,
        ADMISSION: lambda: None,
        GATE: lambda: NextLayerGate(routers, lambda *at: choose(*at)[:count], ahead),
        STACKED: lambda: NextLayerGate(routers, choose, ahead, engine.holds),
        "previous": lambda: PreviousToken(layers, ahead),
        "frequency": lambda: Frequency(lambda: engine.state, top_k, ahead),
        "history": lambda: History(profiled),
        ORACLE: lambda: Oracle(trace, ahead),
    }
    return makers[name]()


def admits(strategy: Strategy) -> bool:
    """Whether a strategy leaves anything to ``ADMISSION``: it swaps experts, or asks for cheaper levels."""
    return strategy.rule.swaps or strategy.rule.cheaper > 0


def check_prefetchers(names: Sequence[str], ahead: int, layers: int) -> None:
    """Whether they exist and can look so far.

    Raises:
        InputError: if not.
    """
    for name in names:
        kind, _, likeliest = name.partition(":")
        if name not in PREFETCHERS and not (kind == GATE and likeliest.isdecimal() and int(likeliest) > 0):
            raise InputError(
                f"unknown prefetcher {name!r}: choose among {', '.join(PREFETCHERS)} and gate:N with N at least 1"
            )
    if not 1 <= ahead < layers:
        raise InputError(f"--ahead must lie between 1 and {layers - 1}, the layers after the first, not {ahead}")
