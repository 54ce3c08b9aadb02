"""ReMoE's rule to the letter (arXiv 2412.14711): weights are max(logit - threshold, 0), those of weight 0 are dropped.

Of a model trained with softmax it changes the size of every output: for comparison, and for models trained so.
"""

from cachemoe.moe.policies.relu_route import most_places
from cachemoe.moe.policies.rule import Rule


def grade(value):
    """Dropped where nothing is left of the value."""
    return -1.0 * (value <= 0.0)


RULE = Rule(
    "relu-literal",
    grade=grade,
    places=most_places,
    offsets=lambda calibration, value: -calibration.thresholds[:, None].expand(calibration.removal.shape),
    function="relu",
    by_logits=True,
)
