"""Only r experts of each layer are left, those that it can least do without (after NAEE, arXiv 2402.14800).

The paper tries every set of experts; calibration removes one after the other, each time the one whose absence changes
the layer's output least: a greedy search, not the paper's. A removed expert is as if its row of the router were not
there: the scores of the others are what they are without it.
"""

import torch

from cachemoe.moe.policies.rule import EXPERTS_CHANGED, Parameter, Rule

ABSENT = -1e30


def offsets(calibration, left):
    """``[L, E]``: of the removed, so much that nothing chooses them."""
    layers, experts = calibration.removal.shape
    removed = calibration.removal[:, : experts - int(left)].long()
    return torch.zeros(layers, experts).scatter_(1, removed, ABSENT)


RULE = Rule(
    "naee-prune",
    parameter=Parameter("r", int, lambda experts, top_k: (top_k, experts)),
    offsets=offsets,
    changes=EXPERTS_CHANGED,
)
