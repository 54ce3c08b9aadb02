"""What modules have, noted, to tell later whether anybody has put something else there."""

from dataclasses import dataclass

import torch

PLAIN = bool, int, float, str


@dataclass(frozen=True, eq=False)
class Contents:
    """Modules' parameters, children, plain attributes and own forwards, and that they have no hooks.

    Args:
        hooks: each module's.
        entries: (dictionary, name, what is there), None for nothing.
        memory: of each parameter where its numbers are, which ``.data`` can change.
    """

    hooks: tuple[dict, ...]
    entries: tuple[tuple[dict, str, object], ...]
    memory: tuple[tuple[torch.nn.Parameter, int], ...]

    @classmethod
    def of(cls, *modules: torch.nn.Module, inside: torch.nn.Module | None = None) -> "Contents":
        """Note what the modules have now.

        Args:
            inside: the module that has them as children, of which nothing else is noted.
        """
        entries = [] if inside is None else [(inside._modules, *each) for each in inside._modules.items()]
        for module in modules:
            own = vars(module)
            entries += [(here, *each) for here in (module._parameters, module._modules) for each in here.items()]
            entries += [(own, *each) for each in own.items() if type(each[1]) in PLAIN]
            entries.append((own, "forward", own.get("forward")))
        hooks = tuple(each for module in modules for each in (module._forward_hooks, module._forward_pre_hooks))
        parameters = [each for *_, each in entries if isinstance(each, torch.nn.Parameter)]
        return cls(hooks, tuple(entries), tuple((each, each.data_ptr()) for each in parameters if not each.is_meta))

    @property
    def unchanged(self) -> bool:
        """Whether all of it is there, and there are no hooks."""
        same = all([here.get(name) is each for here, name, each in self.entries])
        return same and not any(self.hooks) and all([each.data_ptr() == at for each, at in self.memory])
