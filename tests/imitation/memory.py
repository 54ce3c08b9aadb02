"""Page-locked host memory: which addresses CUDA has been told of."""

import weakref

import numpy as np
import torch

ALREADY_REGISTERED, NOT_REGISTERED = 712, 713  # of CUDA's error codes


class LockedMemory:
    """The ranges of host memory that are page-locked. It is also what ``torch.cuda.cudart()`` gives."""

    def __init__(self):
        self._ends: dict[int, int] = {}  # by the first address

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if any(address < end and start < address + size for start, end in self._ends.items()):
            return ALREADY_REGISTERED
        self._ends[address] = address + size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if self._ends.pop(address, None) else NOT_REGISTERED

    def cudaGetErrorString(self, code: int) -> str:
        return {ALREADY_REGISTERED: "part or all of the memory range is already mapped"}[code]

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor of the host lies in it."""
        address = tensor.data_ptr()
        return tensor.device.type == "cpu" and any(start <= address < end for start, end in self._ends.items())

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """As ``Tensor.pin_memory``: unlocked with its last view."""
        if self.holds(tensor):
            return tensor
        buffer = np.empty(max(1, tensor.numel() * tensor.element_size()), np.uint8)
        address = buffer.ctypes.data
        self._ends[address] = address + buffer.size
        weakref.finalize(buffer, self.cudaHostUnregister, address).atexit = False
        memory = torch.from_numpy(buffer)[: tensor.numel() * tensor.element_size()]
        return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)
