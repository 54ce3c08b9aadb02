"""What puts the imitation in torch's and Triton's place, and takes it away again."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._device import _device_constructors

from imitation import streams
from imitation.streams import DEVICES, Machine, current_stream, device_of, machine, started_machine
from imitation.tensors import FACTORIES, DeviceTensor, run, run_whole

GIB = 1 << 30
CUDA, META = 1, 14  # of c10::DeviceType
PROPERTIES = SimpleNamespace(
    name="imitated GPU",
    major=9,
    minor=0,
    total_memory=80 * GIB,
    multi_processor_count=132,
    L2_cache_size=50 << 20,
    uuid="none",
)


@contextmanager
def imitated_gpu() -> Iterator[Machine]:
    """Imitate ``streams.DEVICES`` GPUs while it is open. Not for several threads to open.

    One thing stays: torch's C++ asks only once whether CUDA can be initialised, so that afterwards a tensor on ``cuda``
    is refused in other words than before.
    """
    constructors = _device_constructors()  # which torch looks up once: its own, not what is put in their place
    with ExitStack() as stack:
        started = stack.enter_context(started_machine())
        for owner, replacements in ((torch.cuda, _cuda()), (torch.Tensor, _methods()), (torch, _functions())):
            for name, replacement in replacements.items():
                stack.enter_context(patch.object(owner, name, replacement))
        constructors.add(torch.tensor)  # the one that tells modes of itself: the default device is one of them
        stack.callback(constructors.discard, torch.tensor)
        attention = partial(run_whole, F.scaled_dot_product_attention)  # which chooses among CUDA's own kernels
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
        stack.enter_context(_guarded_devices())
        _replace_launches(stack)
        _replace_factories(stack)
        # Parameters that move to a GPU are of another class there, so that they cannot stay the same object.
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        yield started


def _cuda() -> dict[str, object]:
    """By its name in ``torch.cuda``, what is put there."""
    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: DEVICES,
        "current_device": lambda: machine().of_thread.device,
        "device": streams.current_device,
        "Stream": streams.Stream,
        "Event": streams.Event,
        "stream": streams.used_stream,
        "set_stream": streams.set_stream,
        "current_stream": current_stream,
        "synchronize": streams.synchronize,
        "CUDAGraph": streams.Graph,
        "graph": streams.captured,
        "is_current_stream_capturing": streams.is_capturing,
        "cudart": lambda: machine().locked,
        "mem_get_info": lambda device=None: (70 * GIB, 80 * GIB),
        "memory_reserved": lambda device=None: GIB,
        "memory_allocated": lambda device=None: GIB,
        "empty_cache": lambda: None,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
    }


def _methods() -> dict[str, Callable]:
    """By their names, methods of ``torch.Tensor``."""
    to = torch.Tensor.to

    def numbered(value):
        """A device with its number, which the C++ of a build without CUDA would look up in vain."""
        is_cuda = value == "cuda" or (isinstance(value, torch.device) and value.type == "cuda")
        return device_of(value) if is_cuda else value

    def to_numbered(self, *args, **kwargs):
        return to(self, *map(numbered, args), **{name: numbered(value) for name, value in kwargs.items()})

    return {
        "to": to_numbered,
        "cuda": lambda self, device=None, non_blocking=False: to(self, device_of(device), non_blocking=non_blocking),
        "is_pinned": lambda self, device=None: machine().locked.holds(self),
        "pin_memory": lambda self, device=None: machine().locked.copy(self),
    }


def _functions() -> dict[str, Callable]:
    """By their names, functions of ``torch`` that make tensors with more than torch's dispatcher sees."""

    def pinning(function):
        @wraps(function)
        def made(*args, pin_memory=False, **kwargs):
            tensor = function(*args, **kwargs)
            return tensor.pin_memory() if pin_memory else tensor

        return made

    tensor = torch.tensor

    @wraps(tensor)
    def moved(data, *, device=None, **kwargs):  # made by the host, as it is for CUDA
        if has_torch_function((data,)):  # a mode, too, that is told of this function
            return handle_torch_function(moved, (data,), data, device=device, **kwargs)
        there = device is not None and torch.device(device).type == "cuda"
        made = tensor(data, device="cpu" if there else device, **kwargs)
        return made.to(device) if there else made

    made_pinned = {name: pinning(getattr(torch, name)) for name in ("empty", "zeros", "ones")}
    return {**made_pinned, "tensor": moved}


@contextmanager
def _guarded_devices() -> Iterator[None]:
    """Let torch's C++ make a CUDA device the current one: it does nothing, as for the device ``meta``.

    A build without CUDA has no such guard, and torch has no function to give it one: the table of guards is written to.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    own, guards[CUDA] = guards[CUDA], guards[META]
    try:
        yield
    finally:
        guards[CUDA] = own


def _replace_launches(stack: ExitStack) -> None:
    """Triton's interpreter, where it is installed: on the tensors' memory, when their stream comes to it."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:
        return
    interpret = InterpretedFunction.run

    def launch(kernel, *args, grid, warmup, **kwargs):
        if warmup:
            return
        current, memory = device_of(None), {}
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        for name, value in named.items():
            if isinstance(value, DeviceTensor):
                if value.device != current:
                    raise ValueError(
                        f"Pointer argument {name} is on {value.device}, and {current} is the current device"
                    )
                memory[name] = value.memory
            elif isinstance(value, torch.Tensor) and not value.is_pinned():
                raise ValueError(f"Pointer argument {name} cannot be accessed from Triton (cpu tensor?)")
        current_stream().submit(lambda: interpret(kernel, grid=grid, warmup=False, **named | memory))

    stack.enter_context(patch.object(InterpretedFunction, "run", launch))


def _replace_factories(stack: ExitStack) -> None:
    """The operations that make tensors from none, for the dispatcher's key CUDA."""
    library = torch.library.Library("aten", "IMPL", "CUDA")
    stack.callback(library._destroy)
    with warnings.catch_warnings():  # of kernels that a build with CUDA has
        warnings.simplefilter("ignore")
        for name, operation in FACTORIES.items():

            def make(*args, operation=operation, **kwargs):
                return run(operation, args, kwargs, device_of(kwargs.get("device")))

            library.impl(name, make)
