"""A missing expert but the best gives way to a resident one of its cluster (after MoEC, arXiv 2207.09094).

MoEC trains clusters of experts that stand in for one another while it trains; here a calibration makes them of a model
that has none, by the cosine of the gate's rows, by the similarity of outputs, or by how often two are chosen together.
``any`` has one cluster, all experts: the best-ranked resident stands in. ``random`` has clusters by chance. A stand-in
keeps its own weight, and weights are not made to sum to 1 anew.
"""

import torch

from cachemoe.moe.calibration import LIKENESS
from cachemoe.moe.policies.rule import EXPERTS_CHANGED, Parameter, Rule

WORDS = (*LIKENESS, "any", "random")


def grade(have):
    """SWAP where absent."""
    return -2.0 * (have == 0)


def table(calibration, likeness, experts):
    """The cluster of each expert."""
    if likeness == "any":
        return torch.zeros(experts)
    if likeness == "random":
        return torch.randperm(experts, generator=torch.Generator().manual_seed(0)) % (calibration.clusters.max() + 1)
    return calibration.clusters[LIKENESS.index(likeness)]


RULE = Rule(
    "moec-substitute",
    grade=grade,
    parameter=Parameter("likeness", str, words=WORDS),
    knob_a=lambda likeness: 0.0,
    table=table,
    swaps=True,
    renormalises=False,
    calibrated=True,
    changes=EXPERTS_CHANGED,
)
