"""Each expert has its own precision, fixed beforehand; one cache for all layers (EdgeMoE, arXiv 2308.14352).

The least important experts are stored cheaply: as many as cost no more than the share P of perplexity, which the paper
measures as accuracy. Evicted is who has the fewest uses for the number of layers until its own runs again: the paper's
formula as printed would evict the experts of the next layer first, against its own text.
"""

from cachemoe.moe.policies.rule import PRECISION_CHANGED, Parameter, Rule


def grade(table):
    """The expert's own level."""
    return table


def soon_and_often(last_use, uses, distance):
    """As the text says: uses over the layers until the expert's own runs; the least recent of equals."""
    return ((uses << 20) // distance << 20) + (last_use & 0xFFFFF)


RULE = Rule(
    "edgemoe",
    grade=grade,
    parameter=Parameter("P", float, lambda experts, top_k: (0.0, 1.0)),
    table=lambda calibration, tolerated, experts: calibration.bits(tolerated),
    cheaper=1,
    share=0.35,
    evict=lambda calibration, layers, top_k: soon_and_often,
    shared=True,
    calibrated=True,
    changes=PRECISION_CHANGED,
)
