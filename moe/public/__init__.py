"""cachemoe: Mixture-of-Experts models in less memory than their experts need.

What most users want, by its short name; everything else is in ``cachemoe.kernels``, ``cachemoe.offload``,
``cachemoe.moe`` and ``cachemoe.benchmarks``. Installed, this folder is the package ``cachemoe`` itself.
"""

from importlib import import_module

_HOMES = {
    "load": "cachemoe.moe.load",
    "swap": "cachemoe.moe.load",
    "PooledExperts": "cachemoe.moe.pooled",
    "TINYMOE": "cachemoe.moe.checkpoint",
    "STEEPMOE": "cachemoe.moe.checkpoint",
    "COARSEMOE": "cachemoe.moe.checkpoint",
    "Original": "cachemoe.moe.strategies",
    "Pruning": "cachemoe.moe.strategies",
    "MaxRank": "cachemoe.moe.strategies",
    "CumSum": "cachemoe.moe.strategies",
    "CachePrior": "cachemoe.moe.strategies",
    "InputError": "cachemoe.offload.errors",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    """A name when it is first used: torch and transformers take seconds that ``import cachemoe`` should not."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
