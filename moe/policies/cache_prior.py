"""A resident's value is raised by lambda times the mean range of the layer's logits: what arXiv 2412.00099 proposes."""

from cachemoe.moe.policies.rule import Parameter, Rule


def key(value, have, span, a):
    """The value, a resident's raised by a = lambda times the span."""
    return value + a * span * (have > 0)


RULE = Rule(
    "cache-prior",
    key,
    parameter=Parameter("lambda", float, lambda experts, top_k: (0.0, 1.0)),
    is_exact=lambda value: value == 0,
)
