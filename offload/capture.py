"""Capturing a CUDA graph: the warm-up before, and ``torch.cuda.graph`` with what it leaves to its caller."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def beside() -> Iterator[None]:
    """On a stream of its own, in order with the current one: what is set up at a first use must not be captured."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


@contextmanager
def captured(graph: torch.cuda.CUDAGraph, device: torch.device | None = None) -> Iterator[None]:
    """Capture what is queued within, on the device that is named or else the current one.

    After a capture that failed, the stream is again what it was, and what is raised is what broke the capture: torch
    leaves its own stream there, and raises that a broken capture cannot be ended. Meanwhile no garbage is collected,
    since CUDA allows no capture what freeing some of it takes.
    """
    collects, cause = gc.isenabled(), None
    with torch.cuda.device(device):
        before = torch.cuda.current_stream()
        gc.collect()
        gc.disable()
        try:
            # A stream of this device: torch's own for captures is of the device that was the first to be captured on.
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                try:
                    with _NumbersFromTheDevice():
                        yield
                except BaseException as error:
                    cause = error
                    raise
        except BaseException:
            torch.cuda.set_stream(before)
            if cause is None:
                raise
            raise cause  # noqa: B904 (it came first)
        finally:
            if collects:
                gc.enable()


class _NumbersFromTheDevice(TorchFunctionMode):
    """``torch.tensor`` of a number fills it in on the device, where it would copy from pageable memory.

    A capture refuses such a copy, and transformers 5.17 makes one in each step of eager attention (``eager_mask``).
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.tensor and args and isinstance(args[0], (bool, int, float)):
            function, args = torch.full, ((), args[0])
        return function(*args, **(kwargs or {}))
