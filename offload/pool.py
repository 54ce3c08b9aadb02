"""ExpertPool: the slots, room for one page each, with a capacity for each layer."""

from collections.abc import Sequence

import torch

from cachemoe.kernels.formats import PageFormat
from cachemoe.offload.errors import InputError
from cachemoe.offload.memory import available_memory
from cachemoe.offload.store import aligned_buffer


class ExpertPool:
    """Slots in DRAM for the pages of all layers. Which expert is in which slot is ``Residency``'s to say.

    Args:
        capacity: slots of each layer.
        page_format: layout of a page.

    Raises:
        InputError: if the machine has less memory available than that.
    """

    def __init__(self, capacity: Sequence[int], page_format: PageFormat):
        size, slots = page_format.page_bytes, sum(capacity)
        if slots * size > available_memory():
            raise InputError(
                f"a pool of {slots} slots needs {slots * size / 1e9:.2f} GB of memory, and "
                f"{available_memory() / 1e9:.2f} GB are available: choose a smaller capacity or payload"
            )
        self._memory = aligned_buffer(slots * size)
        pages = torch.from_numpy(self._memory).view(slots, size)
        layers = pages.split(list(capacity))
        self._weights = [page_format.views(slots) for slots in layers]
        self._buffers = [[memoryview(page.numpy()) for page in slots] for slots in layers]

    def weights(self, layer: int) -> dict[str, torch.Tensor]:
        """The layer's slots ``[C, ...]``, as ``PageFormat.views``."""
        return self._weights[layer]

    def buffer(self, layer: int, slot: int) -> memoryview:
        """The slot's bytes, 4 KiB-aligned, for a read to fill."""
        return self._buffers[layer][slot]
