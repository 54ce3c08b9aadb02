"""Each layer's gate on the input of the layer before says which experts to prefetch; the router itself decides.

After Pre-gated MoE (arXiv 2308.12066), whose gates are trained to decide as well: see pregated-exec.
"""

from cachemoe.moe.policies.rule import GATE, Rule

RULE = Rule("pregated-hint", source=GATE, is_exact=lambda value: True)
