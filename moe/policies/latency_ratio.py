"""Experts ranked by weight over latency ** gamma: the selection of WDMoE (arXiv 2411.06681), whose formulas are a
stand-in, since they were not to be verified. A resident's latency is its computing, an absent one's the fetch besides.
"""

from cachemoe.moe.policies.rule import Parameter, Rule


def key(value, cost, a):
    """The logarithm of weight / latency ** a, but for what is the same for all experts of a token: of softmax alone."""
    return value - a * cost


RULE = Rule(
    "latency-ratio",
    key,
    parameter=Parameter("gamma", float, lambda experts, top_k: (0.0, 100.0)),
    by_logits=True,
    is_exact=lambda value: value == 0,
)
