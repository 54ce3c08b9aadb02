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

    Raises:
        InputError: if the machine has less memory available than that.
    """

    def __init__(self, frames: int, page_format: PageFormat, device: torch.device | str = "cpu"):
        self._format, self._device = page_format, torch.device(device)
        self._memory: mmap.mmap | None = None  # of the system, for a pool in DRAM
        # Pages, buffers and weights change together: Ctrl-C may come between any two of Python's instructions.
        self._views: tuple[torch.Tensor, list[memoryview], dict[str, torch.Tensor]] | None = None
        self._make(frames)

    @property
    def pages(self) -> torch.Tensor:
        """``[F, page_bytes]`` uint8."""
        return (self._views or self._look())[0]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The pages' tensors ``[F, ...]``, as ``PageFormat.views``."""
        return (self._views or self._look())[2]

    def buffer(self, frame: int) -> memoryview:
        """The bytes of a frame in DRAM, 4 KiB-aligned, for a read to fill."""
        return (self._views or self._look())[1][frame]

    def wait(self) -> None:
        """Until what is queued on a GPU is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def resize(self, frames: int) -> None:
        """Change F; the frames that stay keep their pages.

        Raises:
            InputError: as when made; the pool is then as it was.
        """
        self._make(frames)

    @torch.inference_mode(False)
    def _make(self, frames: int) -> None:
        size, old = frames * self._format.page_bytes, 0 if self._memory is None else len(self._memory)
        free = _gpu_memory(self._device) if self._device.type == "cuda" else available_memory()
        if size - old > free:
            raise InputError(
                f"a pool of {frames} pages needs {size / 1e9:.2f} GB of memory, and {(free + old) / 1e9:.2f} GB are "
                "available: choose a smaller capacity or payload"
            )
        if self._device.type == "cuda":
            pages = torch.empty(frames, self._format.page_bytes, dtype=torch.uint8, device=self._device)
            if self._views is not None:
                kept = self.pages[:frames]
                pages[: len(kept)] = kept
            self._views = pages, [], self._format.views(pages)
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
        self._views = None  # memory that is looked at cannot be moved
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

    @torch.inference_mode(False)  # whose tensors threads outside of it may not write
    def _look(self) -> tuple[torch.Tensor, list[memoryview], dict[str, torch.Tensor]]:
        """See the memory as pages."""
        pages = torch.from_numpy(np.frombuffer(self._memory, dtype=np.uint8)).view(-1, self._format.page_bytes)
        self._views = pages, [memoryview(page.numpy()) for page in pages], self._format.views(pages)
        return self._views


def _gpu_memory(device: torch.device) -> int:
    """Bytes that can be had: what the GPU has free, and what torch holds and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
