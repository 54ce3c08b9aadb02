"""The last of a token's experts are skipped if their shares together are below sqrt(T / s) (AdapMoE, arXiv 2408.10284).

s is the layer's sensitivity. For two experts it is the published code's rule, the second against the bound; its
constants of s are of its own models, and calibration measures others'. Its runtime gates decode alone, as ``load``
does; its accuracy is of text in which every token was gated, as is that of ``cachemoe quality``.
"""

from cachemoe.moe.policies.rule import Parameter, Rule


def grade(weight, before, a):
    """Dropped where this expert's share and those of the worse are below a; the first comparison is for rounding."""
    return -1.0 * ((weight < a) * ((1.0 - before) < a))


RULE = Rule(
    "adap-skip",
    grade=grade,
    parameter=Parameter("T", float, lambda experts, top_k: (0.0, 1e6)),
    thresholds=lambda calibration, t: (t / calibration.sensitivities.clamp(min=1e-30)).sqrt(),
    is_exact=lambda t: t == 0,
    decode_only=True,
)
