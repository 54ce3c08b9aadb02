"""ExpertPool: memory for pages, in frames of one page each."""

import mmap
from contextlib import suppress

import numpy as np
import torch

from cachemoe.kernels.formats import PageFormat
from cachemoe.offload.errors import InputError
from cachemoe.offload.memory import available_memory


class ExpertPool:
    """Frames for the pages of all layers. Which page is in which frame is the engine's to say.

    Args:
        frames: F.
        page_format: layout of a page.
        device: where the frames are.

    Attributes:
        pages: ``[F, page_bytes]`` uint8.
        weights: their tensors ``[F, ...]``, as ``PageFormat.views``.

    Raises:
        InputError: if the machine has less memory available than that.
    """

    def __init__(self, frames: int, page_format: PageFormat, device: torch.device | str = "cpu"):
        self._format, self._device = page_format, torch.device(device)
        self._memory: mmap.mmap | None = None
        self._make(frames)

    def buffer(self, frame: int) -> memoryview:
        """The bytes of a frame in DRAM, 4 KiB-aligned, for a read to fill."""
        return self._buffers[frame]

    def resize(self, frames: int) -> None:
        """Change F; the frames that stay keep their pages.

        Raises:
            InputError: as when made; the pool is then as it was.
        """
        if self._device.type == "cpu":
            self._make(frames)
            return
        kept = self.pages[:frames]
        self._make(frames)
        self.pages[: len(kept)] = kept

    @torch.inference_mode(False)  # whose tensors threads outside of it may not write
    def _make(self, frames: int) -> None:
        size, old = frames * self._format.page_bytes, 0 if self._memory is None else len(self._memory)
        free = _gpu_memory(self._device) if self._device.type == "cuda" else available_memory()
        if size - old > free:
            raise InputError(
                f"a pool of {frames} pages needs {size / 1e9:.2f} GB of memory, and {(free + old) / 1e9:.2f} GB are "
                "available: choose a smaller capacity or payload"
            )
        if self._device.type == "cuda":
            self.pages = torch.empty(frames, self._format.page_bytes, dtype=torch.uint8, device=self._device)
            self.weights = self._format.views(self.pages)
            return
        try:
            self._map(size)
        except OSError as error:
            raise InputError(
                f"the system refuses {size / 1e9:.2f} GB of memory for a pool of {frames} pages ({error.strerror}): "
                "choose a smaller one"
            ) from error
        finally:
            if self._memory is not None:  # the new or, after a refusal, still the old
                self._look()

    def _map(self, size: int) -> None:
        """Memory of the system's own, since it alone can grow and shrink in place; the old stays if that is refused."""
        old, private = self._memory, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._buffers = self.weights = self.pages = None  # memory that is looked at cannot be moved
        try:
            if old is not None:
                old.resize(size)
            else:
                self._memory = mmap.mmap(-1, size, private)
        except BufferError:  # somebody else looks at it, a traceback say
            new, kept = mmap.mmap(-1, size, private), min(size, len(old))
            memoryview(new)[:kept] = memoryview(old)[:kept]
            self._memory = new
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # where the system has none
                self._memory.madvise(mmap.MADV_HUGEPAGE)  # fewer misses of the address cache: every weight is read once

    def _look(self) -> None:
        """See the memory as pages."""
        self.pages = torch.from_numpy(np.frombuffer(self._memory, dtype=np.uint8)).view(-1, self._format.page_bytes)
        self._buffers = [memoryview(page.numpy()) for page in self.pages]
        self.weights = self._format.views(self.pages)


def _gpu_memory(device: torch.device) -> int:
    """Bytes that can be had: what the GPU has free, and what torch holds and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
