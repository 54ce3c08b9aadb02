"""Each of the K chosen but the best computes cheaply by chance: the control beside a policy that chooses who does."""

from cachemoe.moe.policies.rule import PRECISION_CHANGED, Parameter, Rule


def grade(noise, a):
    """Cheaply with probability a."""
    return 1.0 * (noise < a)


RULE = Rule(
    "random-cheap",
    grade=grade,
    parameter=Parameter("probability", float, lambda experts, top_k: (0.0, 1.0)),
    cheaper=1,
    share=0.35,
    is_exact=lambda value: value == 0,
    changes=PRECISION_CHANGED,
)
