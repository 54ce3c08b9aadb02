"""As max-rank, the window being the fewest experts whose probabilities sum to p (arXiv 2412.00099, algorithm 2)."""

from cachemoe.moe.policies.rule import Parameter, Rule


def key(rank, before, have, a):
    """Above all ranks for a resident whose betters have less than a = p of the scores; else by rank."""
    return 65536.0 * ((before < a) * (have > 0)) - rank


RULE = Rule(
    "cumsum",
    key,
    parameter=Parameter("p", float, lambda experts, top_k: (0.001, 1.0)),
    # All experts sum to 1 whatever float32 says: p = 1 is a window of all.
    knob_a=lambda value: 2.0 if value == 1 else value,
)
