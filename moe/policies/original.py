"""The model's own top-K, whatever is resident."""

from cachemoe.moe.policies.rule import Rule

RULE = Rule("original", is_exact=lambda value: True)
