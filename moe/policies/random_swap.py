"""Of the model's K, all but the J best each give way to any other by chance: the control beside a policy that swaps."""

from cachemoe.moe.policies.rule import Parameter, Rule


def key(rank, noise, a, b):
    """The K = b best that stay, with probability 1 - a; the experts beyond them in any order; those that go."""
    return 2.0 * ((rank < b) * (noise >= a)) + (0.5 + noise) * (rank >= b)


RULE = Rule(
    "random-swap",
    key,
    parameter=Parameter("probability", float, lambda experts, top_k: (0.0, 1.0)),
    knob_b=lambda value, top_k: top_k,
    is_exact=lambda value: value == 0,
)
