"""Tensors that say ``cuda`` while their data lies in CPU memory, and how operations on them run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from imitation.streams import Stream, current_stream, device_of, host_waits, machine, place

aten = torch.ops.aten
# The host has to know what they give, or how large it is.
WAITING = {
    aten._local_scalar_dense.default: "for a number",
    aten.is_nonzero.default: "for a number",
    aten.equal.default: "whether tensors are equal",
    aten.nonzero.default: "how many are nonzero",
    aten.masked_select.default: "how many are selected",
    aten.repeat_interleave.Tensor: "how many there will be",
    aten._unique2.default: "how many differ",
    aten.unique_dim.default: "how many differ",
    aten.unique_consecutive.default: "how many differ",
    aten.bincount.default: "how large the largest is",
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
UNWRITTEN = {  # they give memory, and write nothing to it
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
MATRIX_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.mv.default}
# What makes tensors from none; torch builds the others of these.
FACTORIES = {
    "empty.memory_format": aten.empty.memory_format,
    "empty_strided": aten.empty_strided.default,
    "arange": aten.arange.default,
    "arange.start": aten.arange.start,
    "arange.start_step": aten.arange.start_step,
}


class DeviceTensor(torch.Tensor):
    """A tensor of an imitated GPU.

    Attributes:
        memory: the same on the CPU; where tensors share memory, so do these.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, memory: torch.Tensor, device: torch.device):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            memory.shape,
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            device=device,
        )
        tensor.memory = memory
        return tensor

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    def numpy(self, *, force=False):
        if not force:
            raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")
        return self.cpu().numpy()

    def tolist(self):
        return self.cpu().tolist()

    def is_pinned(self, device=None) -> bool:
        return False

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"DeviceTensor({self.memory}, device={self.device})"

    def __format__(self, specification: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), specification)

    def __deepcopy__(self, memo):
        copy = self.detach().clone()
        return torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with torch._C._InferenceMode(False):  # which allows no views of what was made outside of it
            return dispatch(func, args, kwargs or {})


def dispatch(func, args: tuple, kwargs: dict) -> Any:
    """Do one of torch's operations where its tensors are, or raise as CUDA would."""
    if func._can_decompose():  # as it comes under inference mode
        result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    if func is aten.copy_.default:
        return _copy_into(*args, **kwargs)
    if func is aten._to_copy.default:
        return _to_copy(*args, **kwargs)
    devices = _checked_devices(func, args, kwargs)
    if func in MATRIX_PRODUCTS and not args[0].is_floating_point():
        raise NotImplementedError(f'"{func}" not implemented for {args[0].dtype}')
    if func in WAITING:
        host_waits(WAITING[func])
    target = kwargs.get("device")
    if target is not None and torch.device(target).type != "cuda":  # such as zeros_like for the host
        return func(*_on_cpu(args), **_on_cpu(kwargs))
    return run(func, args, kwargs, devices[0] if target is None else device_of(target))


def run(func, args: tuple, kwargs: dict, device: torch.device) -> Any:
    """Have the device's current stream do an operation."""
    stream = current_stream(device)
    work = partial(_as_on_cuda(func), *_on_cpu(args, stream.eager), **_on_cpu(kwargs, stream.eager))
    if func._schema.is_mutable:
        return _write(stream, func, work, args, kwargs)
    return _on_device(_compute(stream, work, func in UNWRITTEN), device)


def run_whole(function: Callable, *args, **kwargs) -> Any:
    """Do a function whole that torch would take apart into kernels of CUDA's own; it writes to no argument."""
    device = next((tensor.device for tensor in _tensors((args, kwargs)) if isinstance(tensor, DeviceTensor)), None)
    if device is None:
        return function(*args, **kwargs)
    stream = current_stream(device)
    work = partial(function, *_on_cpu(args, stream.eager), **_on_cpu(kwargs, stream.eager))
    return _on_device(_compute(stream, work), device)


def _compute(stream: Stream, work: partial, unwritten: bool = False) -> Any:
    """The results of work that writes to no argument.

    On a stream that is behind, they have the right shapes; what they hold comes when it is their turn.
    """
    with machine().lock:
        result = work()
    given = {_address(tensor) for tensor in _tensors((work.args, work.keywords))}
    made = [tensor for tensor in _tensors(result) if _address(tensor) not in given]  # the others are views
    if unwritten:
        poison(made)
    if made and not stream.eager:
        stream.fresh.update(map(_address, made))
        stream.submit(lambda: made if unwritten else _fill(made, work()))  # and keeps them
    return result


def poison(tensors: Iterable[torch.Tensor]) -> None:
    """What nothing has been written to may hold anything: NaN, where it can.

    Indices are zeros: work that follows a kernel that is not done yet has to find them in range.
    """
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.element_size() > 1:
            tensor.fill_(float("nan"))
        elif tensor.dtype in (torch.int32, torch.int64):
            tensor.zero_()


def _write(stream: Stream, func, work: Callable[[], object], args: tuple, kwargs: dict) -> Any:
    """An operation that writes to some of its arguments, and gives those back."""
    named = {argument.name: argument for argument in func._schema.arguments}
    given = dict(zip(named, args, strict=False)) | kwargs
    written = [value for name, value in given.items() if _is_written(named[name]) and value is not None]
    # In memory that only this stream's late work has seen it is done now, too: later shapes may depend on it.
    if not stream.eager and all(_address(tensor.memory) in stream.fresh for tensor in written):
        work()
    stream.submit(work)
    for tensor in written:
        if tensor.shape != tensor.memory.shape:
            raise NotImplementedError(f"{func} changes a tensor's shape in place, which the imitation does not follow")
    if not func._schema.returns:
        return None
    return written[0] if len(written) == 1 else tuple(written)


def _is_written(argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _fill(made: list[torch.Tensor], result: Any) -> None:
    for tensor, value in zip(made, _tensors(result), strict=True):
        tensor.copy_(value)


def _copy_into(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if target.device == source.device:
        return run(aten.copy_.default, (target, source), {}, target.device)
    _transfer(target, source, non_blocking, target if target.device.type == "cpu" else source)
    return target


def _to_copy(
    source, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None
) -> torch.Tensor:
    options = {"dtype": dtype, "memory_format": memory_format}
    device = source.device if device is None else torch.device(device)
    device = device_of(device) if device.type == "cuda" else device
    if device == source.device:
        return run(aten._to_copy.default, (source,), options, device)
    target = torch.empty_like(source, **options, device=device)
    # Of a copy to the host that does not block torch makes the target in pinned memory.
    pinned = non_blocking and device.type == "cpu"
    _transfer(target, source, non_blocking, None if pinned else source if device.type == "cuda" else target)
    return target


def _transfer(target: torch.Tensor, source: torch.Tensor, non_blocking: bool, host: torch.Tensor | None) -> None:
    """A copy from one device to another.

    Args:
        host: which of the two lies in the host's memory and may be pageable; None: neither.
    """
    device = next(each.device for each in (target, source) if isinstance(each, DeviceTensor))
    stream, pinned = current_stream(device), host is None or machine().locked.holds(host)
    if stream is machine().capture and not pinned:
        raise RuntimeError(
            "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned. "
            f"Please use tensor.pin_memory() or allocate the tensor with pin_memory=True. At {place()}"
        )
    target, memory = _on_cpu((target, source.detach()))
    if non_blocking and not pinned and host is source:  # small ones are put aside by the driver, which does not wait
        memory, pinned = memory.clone(), True
    if not (non_blocking and pinned):
        host_waits("for a copy between host and device")
        stream.submit(lambda: target.copy_(memory))
        stream.finish()
    else:
        stream.submit(lambda: target.copy_(memory))


def _checked_devices(func, args: tuple, kwargs: dict) -> list[torch.device]:
    """The devices of the tensors on GPUs.

    Raises:
        RuntimeError: if the operation mixes devices, in a way that CUDA does not allow.
    """
    if func in INDEXING:
        indices = [index for index in args[1] if index is not None]
        if not isinstance(args[0], DeviceTensor):
            raise RuntimeError(
                f"indices should be either on cpu or on the same device as the indexed tensor (cpu), at {place()}"
            )
        masks = [index for index in indices if index.dtype == torch.bool]
        fills = len(args) > 2 and args[2].numel() == 1
        if any(not isinstance(index, DeviceTensor) for index in indices):
            host_waits("for the copy of an index")
        elif masks and not fills:
            host_waits("how many a mask selects")
        args = (args[0], *args[2:])
    tensors = list(_tensors((args, kwargs)))
    devices = [tensor.device for tensor in tensors if isinstance(tensor, DeviceTensor)]
    others = {str(tensor.device) for tensor in tensors if tensor.device != devices[0] and tensor.dim()}
    if others:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {devices[0]} and "
            f"{min(others)}: {func} at {place()}"
        )
    return devices


def _as_on_cuda(func) -> Callable:
    """What a CPU computes otherwise than CUDA."""
    if func is not aten.histc.default:
        return func

    def count(values, *args, **kwargs):  # integers, too, which a CPU refuses
        return func(values.float(), *args, **kwargs).to(values.dtype)

    return count


def _on_cpu(value: Any, now: bool = True) -> Any:
    """With the memory of the tensors that are on a GPU.

    Args:
        now: whether it is used at once. What is used later has copies of the host's numbers: CUDA reads those when the
            work is asked for, not when it is done.
    """
    if isinstance(value, DeviceTensor):
        return value.memory
    if isinstance(value, torch.Tensor):
        return value if now or value.dim() else value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(each, now) for each in value)
    if isinstance(value, dict):
        return {name: _on_cpu(each, now) for name, each in value.items() if name != "pin_memory"}
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return DeviceTensor(value, device)
    if isinstance(value, (list, tuple)):
        return type(value)(_on_device(each, device) for each in value)
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
