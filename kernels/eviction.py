"""What an eviction policy sees of the experts in a cache, and the keys that it gives them."""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from cachemoe.kernels.policy import words_of


def eviction(evict: Callable, state) -> Callable[[], np.ndarray]:
    """The policy's keys as they are whenever it is asked: the smallest leaves.

    Args:
        evict: a function of some of ``EVICT_WORDS``, in arithmetic and comparison operators alone -> int64.
        state: ``Residency`` of B caches on the CPU, and of the layer that is routed.

    Returns:
        () -> int64 ``[B, N]`` of the N experts in each cache; with ``state`` changed in between, other keys.
    """
    seen = {
        "last_use": state.last_use,
        "uses": state.uses,
        "heavy": state.uses if state.heavy is None else state.heavy,
        "expected": torch.zeros_like(state.uses) if state.expected is None else state.expected,
        "clock": state.clock[:, None],
    }
    memory = {name: tensor.numpy() for name, tensor in seen.items()}
    memory["distance"] = _distances(state.experts, state.layers, state.layer)
    arguments = [memory[word] for word in words_of(evict)]
    return lambda: evict(*arguments)


@cache
def _distances(experts: int, layers: int, layer: int) -> np.ndarray:
    """``[1, L * E]``: after how many layers each expert's runs next, when this layer runs."""
    return (np.arange(layers * experts)[None] // experts - layer - 1) % layers + 1
