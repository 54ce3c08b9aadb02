"""Only the K' best of the model's K: the paper's baseline that knows no cache (arXiv 2412.00099)."""

from cachemoe.moe.policies.rule import Parameter, Rule


def grade(place, a):
    """Dropped from the place a = K' on."""
    return -1.0 * (place >= a)


RULE = Rule("pruning", grade=grade, parameter=Parameter("K'", int, lambda experts, top_k: (1, top_k - 1)))
