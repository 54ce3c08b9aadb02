"""Residents among the M best-ranked experts come before all others (arXiv 2412.00099, algorithm 1)."""

from cachemoe.moe.policies.rule import Parameter, Rule


def key(rank, have, a):
    """Above all ranks for a resident within the window a = M; else by rank."""
    return 65536.0 * ((rank < a) * (have > 0)) - rank


RULE = Rule("max-rank", key, parameter=Parameter("M", int, lambda experts, top_k: (1, experts)))
