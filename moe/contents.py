"""What modules have, noted, to tell later whether anybody has put something else there.

Calls that stand for the modules would pass it by.
"""

from operator import attrgetter, eq, is_

import torch
from torch.nn.modules.module import _has_any_global_hook

try:
    from transformers.utils import output_capturing

    _RECORDER = getattr(output_capturing, "_active_collector", None)
except ImportError:  # of a transformers that has none: any hook counts
    _RECORDER = None

PLAIN = bool, int, float, str
_FORWARD, _DTYPE, _WRITES = map(attrgetter, ("forward", "dtype", "_version"))


class Contents:
    """Modules' parameters, buffers, children, plain attributes and forwards, as they are when this is made.

    Args:
        modules: they have no hooks.
        inside: the module that has them as children, of which nothing else is noted.
    """

    def __init__(self, *modules: torch.nn.Module, inside: torch.nn.Module | None = None):
        entries = [] if inside is None else [(inside._modules, *each) for each in inside._modules.items()]
        for module in modules:
            own = vars(module)
            places = module._parameters, module._buffers, module._modules
            entries += [(here, *each) for here in places for each in here.items()]
            entries += [(own, *each) for each in own.items() if type(each[1]) in PLAIN]
            entries.append((own, "forward", own.get("forward")))
        tensors = [each for *_, each in entries if isinstance(each, torch.Tensor) and not each.is_meta]
        # Columns, so that few of Python's instructions look at all of it: a layer is looked at for every token.
        self._entries = tuple(zip(*entries, strict=True))
        self._forwards = [type(module) for module in modules], [type(module).forward for module in modules]
        self._where = tensors, [each.data_ptr() for each in tensors]
        self._dtypes = tensors, [each.dtype for each in tensors]
        counted = [each for each in tensors if not each.is_inference()]
        self._writes = counted, [each._version for each in counted]
        self._hooks = [each for module in modules for each in (module._forward_hooks, module._forward_pre_hooks)]

    @property
    def unchanged(self) -> bool:
        """Whether all of it is there, where it was and as often written to, and no hook would do something."""
        (dicts, names, there), (classes, forwards) = self._entries, self._forwards
        return (
            all(map(is_, map(dict.get, dicts, names), there))
            and all(map(is_, map(_FORWARD, classes), forwards))
            and all(map(eq, map(torch.Tensor.data_ptr, self._where[0]), self._where[1]))
            and all(map(is_, map(_DTYPE, self._dtypes[0]), self._dtypes[1]))
            and all(map(eq, map(_WRITES, self._writes[0]), self._writes[1]))
            and not (any(self._hooks) and self._hooked())
            and not _has_any_global_hook()
        )

    def _hooked(self) -> bool:
        """Whether any hook would do something: those that transformers leaves on modules do while it records."""
        if _RECORDER is None or _RECORDER.get():
            return True
        return any(hook.__module__ != output_capturing.__name__ for hooks in self._hooks for hook in hooks.values())
