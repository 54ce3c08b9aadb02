"""Memory that the system never swaps out, page-locked for CUDA where there is a GPU."""

import ctypes
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch

from cachemoe.offload.errors import InputError
from cachemoe.offload.memory import available_memory
from cachemoe.offload.store import aligned_buffer


class LockedMemory:
    """One page-locked allocation, unlocked by ``close``, or else with its last view.

    Attributes:
        memory: ``[pages, page_bytes]`` uint8, 4 KiB-aligned; ``[0, page_bytes]`` once closed.

    Raises:
        InputError: if the machine has less memory available, or refuses to lock it.
    """

    def __init__(self, pages: int, page_bytes: int):
        size = pages * page_bytes
        if size > (available := available_memory()):
            raise InputError(
                f"{size / 1e9:.2f} GB of page-locked memory are asked for, and {available / 1e9:.2f} GB are available: "
                "choose a smaller pinned level"
            )
        try:
            buffer = aligned_buffer(size)
            unlock = _lock(buffer.ctypes.data, size)
        except (OSError, MemoryError) as error:
            buffer = None  # which the traceback would hold
            raise InputError(
                f"the system refuses to page-lock {size / 1e9:.2f} GB of memory ({error}): raise `ulimit -l`, or "
                "choose a smaller pinned level"
            ) from error
        self.memory = torch.from_numpy(buffer).view(pages, page_bytes)
        self._unlock = weakref.finalize(buffer, unlock)  # memory must not be freed while CUDA has it registered
        self._unlock.atexit = False  # the process's end unlocks

    def buffer(self, page: int) -> memoryview:
        """A page's bytes, for a read to fill."""
        return memoryview(self.memory[page].numpy())

    def close(self) -> None:
        self.memory = self.memory.new_empty(0, self.memory.shape[1])
        self._unlock()


def _lock(address: int, size: int) -> Callable[[], None]:
    """Page-lock memory, for CUDA where there is a GPU; gives the function that unlocks it.

    Raises:
        OSError: if the system refuses.
    """
    if torch.cuda.is_available():
        cudart = torch.cuda.cudart()
        code = cudart.cudaHostRegister(address, size, 0)  # not pin_memory(), which rounds up to a power of two
        if int(code):
            with suppress(RuntimeError):  # the next launch raises what CUDA keeps as its last error
                torch.ones(1, device="cuda")
            raise OSError(f"CUDA says {cudart.cudaGetErrorString(code)}")
        return partial(_unregister, address)
    libc, memory = ctypes.CDLL(None, use_errno=True), (ctypes.c_void_p(address), ctypes.c_size_t(size))
    if libc.mlock(*memory):
        reason = os.strerror(ctypes.get_errno())
        libc.munlock(*memory)  # a refusal half way leaves the first half locked
        raise OSError(reason)
    return partial(libc.munlock, *memory)


def _unregister(address: int) -> None:
    for device in range(torch.cuda.device_count()):  # a kernel that still reads the memory would fault
        # Waiting for a device that the process does not use would set it up first.
        if device == torch.cuda.current_device() or torch.cuda.memory_reserved(device):
            torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(address)
