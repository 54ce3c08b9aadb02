"""Routing policies, a system a file: each module has a ``RULE``, and is known by its being here."""

from importlib import import_module
from pkgutil import iter_modules

from cachemoe.moe.policies.rule import Rule

_SYSTEMS = sorted(module.name for module in iter_modules(__path__) if module.name != "rule")
RULES: dict[str, Rule] = {rule.name: rule for rule in (import_module(f"{__name__}.{name}").RULE for name in _SYSTEMS)}
"""By the names that a user types."""
