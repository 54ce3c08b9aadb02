"""Chosen experts whose weight is small against the best one's are skipped (NAEE, arXiv 2402.14800).

The bound is a quantile, over a calibration text, of these ratios in the layer: its median in the paper, whose models
choose two experts. For more than two a layer still has one bound, so that on that text the share q of the experts
beside the best is skipped.
"""

from cachemoe.moe.policies.rule import Parameter, Rule


def grade(weight, first, a):
    """Dropped where weight < beta * the best one's, beta = a."""
    return -1.0 * (weight < a * first)


RULE = Rule(
    "naee-skip",
    grade=grade,
    parameter=Parameter("q", float, lambda experts, top_k: (0.0, 1.0)),
    thresholds=lambda calibration, q: calibration.ratio(q) if q else 0.0 * calibration.thresholds,
    is_exact=lambda q: q == 0,
)
