"""A table by token id routes all layers but the first: decoupled-hint's, which was not trained to decide."""

from cachemoe.moe.policies.rule import TOKEN, Rule

RULE = Rule("decoupled-exec", source=TOKEN, decides=True)
