"""As many experts a token as lie above the layer's threshold, at least one (after ReMoE, arXiv 2412.14711).

The paper trains routers with ReLU. Here the threshold is the one above which, over a calibration text, the model's own
K lie on average; weights are the model's own rule. A token takes twice the model's K at most.
"""

from cachemoe.moe.policies.rule import Rule


def most_places(value: None, top_k: int, experts: int) -> int:
    """Experts of a token at most: the kernel takes 16."""
    return max(top_k, min(2 * top_k, experts, 16))


def grade(value, a):
    """Dropped where the value is not above the threshold a."""
    return -1.0 * (value <= a)


RULE = Rule("relu-route", grade=grade, places=most_places, thresholds=lambda calibration, value: calibration.thresholds)
