"""What an eviction policy sees of the experts in a cache, and the keys that it gives them."""

from collections.abc import Callable
from functools import cache

import numpy as np

from cachemoe.kernels.policy import words_of


def eviction(evict: Callable, state) -> Callable[[], np.ndarray]:
    """The policy's keys as they are whenever it is asked: the smallest leaves.

    Args:
        evict: a function of some of ``EVICT_WORDS``, in arithmetic and comparison operators alone -> int64.
        state: ``Residency`` of B caches on the CPU, and of the layer that is routed.

    Returns:
        () -> int64 ``[B, N]`` of the N experts in each cache; with ``state`` changed in between, other keys.
    """
    arguments = [_SEEN[word](state) for word in words_of(evict)]
    return lambda: evict(*arguments)


def _expected(state) -> np.ndarray:
    return np.zeros_like(state.on_host.uses) if state.expected is None else state.on_host.expected


@cache
def _distances(experts: int, layers: int, layer: int) -> np.ndarray:
    """``[1, L * E]``: after how many layers each expert's runs next, when this layer runs."""
    return (np.arange(layers * experts)[None] // experts - layer - 1) % layers + 1


# Of each word its numbers, a view of the state where they change; only those named are made, as a miss waits for them.
_SEEN = {
    "last_use": lambda state: state.on_host.last_use,
    "uses": lambda state: state.on_host.uses,
    "heavy": lambda state: state.on_host.uses if state.heavy is None else state.on_host.heavy,
    "expected": _expected,
    "distance": lambda state: _distances(state.experts, state.layers, state.layer),
    "clock": lambda state: state.on_host.clock[:, None],
}
