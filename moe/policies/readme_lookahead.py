"""Who leaves is who is needed last of those that a forecast knows of, before them who is not expected (Read-ME).

Read-ME (arXiv 2410.19123) routes all layers of a queue of tokens beforehand, by a router that it trains to see tokens
alone, and evicts as Belady would. Here a table by token id, from a calibration, says what the next W layers of this
token will probably choose: beyond these, the least recently used leaves. It prefetches too; the routers decide.
"""

from cachemoe.moe.policies.rule import TOKEN, Parameter, Rule


def farthest_next_use(last_use, expected, distance):
    """The unexpected first, the least recent of them; then those of the farthest layer."""
    return expected * ((1 << 50) - distance) + (1 - expected) * last_use


RULE = Rule(
    "readme-lookahead",
    parameter=Parameter("W", int, lambda experts, top_k: (0, 1 << 20)),
    source=TOKEN,
    evict=lambda calibration, layers, top_k: farthest_next_use,
    shared=True,
    forecasts=True,
    is_exact=lambda value: True,
)
