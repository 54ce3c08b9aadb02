"""Only the K' best of the model's K: the paper's baseline that knows no cache (arXiv 2412.00099)."""

from cachemoe.moe.policies.rule import Parameter, Rule

RULE = Rule(
    "pruning",
    parameter=Parameter("K'", int, lambda experts, top_k: (1, top_k - 1)),
    places=lambda value, top_k, experts: int(value),
)
