"""Each layer is routed by its gate on the input of the layer before, a layer early (Pre-gated MoE, arXiv 2308.12066).

The paper trains the gates for it; these are the model's own, untrained for the input that they get here.
"""

from cachemoe.moe.policies.rule import GATE, Rule

RULE = Rule("pregated-exec", source=GATE, decides=True)
