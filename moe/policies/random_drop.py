"""Each of the K chosen but the best is dropped by chance: the control beside a policy that drops as many on purpose."""

from cachemoe.moe.policies.rule import Parameter, Rule


def grade(noise, a):
    """Dropped with probability a."""
    return -1.0 * (noise < a)


RULE = Rule(
    "random-drop",
    grade=grade,
    parameter=Parameter("probability", float, lambda experts, top_k: (0.0, 1.0)),
    is_exact=lambda value: value == 0,
)
