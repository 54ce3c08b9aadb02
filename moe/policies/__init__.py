"""Routing policies, a system a file: each module has a ``RULE``, and is known by its being here."""

from importlib import import_module
from pkgutil import iter_modules

from cachemoe.moe.policies.rule import Rule

RULES: dict[str, Rule] = {
    rule.name: rule
    for name in sorted(module.name for module in iter_modules(__path__) if module.name != "rule")
    if (rule := import_module(f"{__name__}.{name}").RULE)
}
"""By the names that a user types."""
