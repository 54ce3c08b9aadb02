"""A table by token id says which experts to prefetch; the router decides (after Read-ME, arXiv 2410.19123).

The paper trains one router for all layers that sees tokens alone, so that it is known ahead. The table has each layer's
mean logits for each token of the calibration's text, and those of all its tokens for any other.
"""

from cachemoe.moe.policies.rule import TOKEN, Rule

RULE = Rule("decoupled-hint", source=TOKEN, is_exact=lambda value: True)
