"""A missing expert but the best is computed from a low-rank surrogate that is always in memory (after Omni-SMoLA).

Omni-SMoLA (arXiv 2312.00968) trains low-rank experts and mixes all of them, so that it has nothing to fetch; here each
expert is the mean of its layer's experts, neurons aligned, and a residual of rank r, and the surrogates' bytes are
taken from the pool. A miss that is not the best costs no byte; the best is fetched, so that the pool follows the text.
"""

from cachemoe.moe.policies.rule import PRECISION_CHANGED, Parameter, Rule


def grade(place, have):
    """The surrogate where the expert is not resident whole, but for the best."""
    return 1.0 * (have != 1) * (place > 0)


RULE = Rule(
    "smola-lowrank",
    grade=grade,
    parameter=Parameter("r", int, lambda experts, top_k: (0, 1 << 20)),
    cheaper=1,
    resident=True,
    changes=PRECISION_CHANGED,
)
