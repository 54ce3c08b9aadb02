"""Missing experts are fetched whole if they weigh much, else cheaply, or not at all (HOBBIT, arXiv 2411.01433).

What decides is the share of the K's scores that the better-placed have: up to T1 full precision, up to T2 a cheaper
level, beyond that the expert does not run. The best is always fetched whole; what is resident runs as it is. One cache
for all layers, with room for each level; eviction weighs how recently, how often, and how often at full precision a
token used an expert, and how soon its layer runs. The paper does not give the weights: calibration finds them.
"""

from cachemoe.moe.policies.rule import PRECISION_CHANGED, Parameter, Rule


def grade(before, have, a, b):
    """Full precision where that is resident or before <= a = T1; cheaper up to b = T2; dropped beyond, if absent."""
    return 1.0 * (have != 1) * (1.0 * (before > a) - 2.0 * ((before > b) * (have == 0)))


def eviction(weights, layers, top_k):
    """Its eviction policy, equation 3, times the number of tokens, layers and touches: whole numbers.

    Args:
        weights: of recency, frequency, frequency at full precision and nearness, whole numbers.
        layers: L.
        top_k: K; a token touches L * K experts.
    """
    recency, frequency, precision, nearness = (int(each) for each in weights)
    touches = layers * top_k

    def priority(last_use, uses, heavy, distance, clock):
        used = recency * last_use + touches * (frequency * uses + precision * heavy)
        return layers * used + nearness * clock * (layers - distance % layers)

    return priority


def _whole(bound: float) -> float:
    """All shares sum to 1 whatever float32 says: a bound of 1 is never exceeded."""
    return 2.0 if bound == 1 else bound


RULE = Rule(
    "hobbit",
    grade=grade,
    parameter=Parameter("T1", float, lambda experts, top_k: (0.0, 1.0)),
    second=Parameter("T2", float, lambda experts, top_k: (0.0, 1.0)),
    knob_a=_whole,
    knob_b=lambda bound, top_k: _whole(bound),
    renormalises=False,
    cheaper=1,
    share=0.25,
    evict=lambda calibration, layers, top_k: eviction(calibration.hobbit, layers, top_k),
    shared=True,
    calibrated=True,
    is_exact=lambda value: value == 1,
    changes=PRECISION_CHANGED,
)
