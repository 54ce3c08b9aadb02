"""Stores whose pages lie in page-locked host memory: all of them (``PinnedStore``) or the last used (``PinnedLevel``).

A GPU copies and reads such memory without the host's help, and the system never swaps it out.
"""

import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition

import numpy as np
import torch

from cachemoe.offload.carriers import ReadCarrier
from cachemoe.offload.errors import InputError
from cachemoe.offload.link import Link
from cachemoe.offload.locked_memory import LockedMemory
from cachemoe.offload.store import PinnedPages, Store


class PinnedStore(PinnedPages):
    """Every page of a store in one page-locked allocation. Close it, or use it as a context manager.

    Args:
        store: where the pages are read from, once; it may be closed afterwards.
        advance: called after each page read.

    Attributes:
        layout, pages, page_bytes: as ``Store``'s.
        memory: ``[L * E, page_bytes]`` uint8, 4 KiB-aligned, expert by expert, layer by layer; ``[0, page_bytes]``
            once closed.

    Raises:
        InputError: if the machine has less memory available, or refuses to lock it.
        Exception: what the store raised, if a page cannot be read; nothing stays locked.
    """

    permanent = True

    def __init__(self, store: Store, advance: Callable[[], None] = lambda: None):
        self.layout, self.pages, self.page_bytes = store.layout, store.pages, store.page_bytes
        self._locked = LockedMemory(self.pages, self.page_bytes)
        try:
            self._fill(store, advance)
        except BaseException as error:
            self.close()
            traceback.clear_frames(error.__traceback__)  # a reader's would hold the memory, in a cycle
            raise

    @property
    def memory(self) -> torch.Tensor:
        return self._locked.memory

    def page(self, layer: int, expert: int) -> torch.Tensor:
        """The page, ``[page_bytes]`` uint8, where it lies."""
        return self.memory[layer * self.layout.experts + expert]

    @contextmanager
    def lease(self, layer: int, expert: int) -> Iterator[torch.Tensor]:
        """As ``PinnedLevel.lease``; here every page stays."""
        yield self.page(layer, expert)

    def offset(self, layer: int, expert: int) -> int:
        """First byte of a page, counted from the start of the memory."""
        return (layer * self.layout.experts + expert) * self.page_bytes

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Copy ``len(buffer)`` bytes at ``offset``.

        Raises:
            OSError: if they are not all in the memory, or it is closed.
        """
        memory = self.memory.flatten().numpy()
        if not 0 <= offset <= memory.size - len(buffer):
            raise OSError(f"{len(buffer)} bytes at {offset} are not in the {memory.size} bytes of the pinned store")
        _copy(memory[offset : offset + len(buffer)], buffer)

    def close(self) -> None:
        """Unlock the memory, which goes with its last view; a second call does nothing."""
        self._locked.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _fill(self, store: Store, advance: Callable[[], None]) -> None:
        with Link([ReadCarrier(store, self._locked)]) as link:
            asked = [link.request(*divmod(index, self.layout.experts), index) for index in range(self.pages)]
            for _ in link.landed(asked):
                advance()


@dataclass(eq=False)
class _Held:
    """A page in the level, or on its way into it."""

    page: torch.Tensor  # [page_bytes] uint8
    leases: int = 1  # threads that use it, read it or wait for it
    arrived: bool = False
    failure: str = ""


class PinnedLevel(PinnedPages):
    """A bounded, page-locked level over a store: the pages last leased, evicted by LRU. Any thread may use it.

    Close it, or use it as a context manager.

    Args:
        store: where pages are read from; it stays open as long as the level is used.
        slots: pages that the level holds, 1 to L * E.

    Attributes:
        layout, pages, page_bytes: of the store.
        hits: leases that read nothing, those that waited for another thread's read among them.
        misses: leases that read their page from the store, or tried to.

    Raises:
        InputError: if ``slots`` are too few or too many, the machine has less memory available, or refuses to lock it.
    """

    permanent = False

    def __init__(self, store: Store, slots: int):
        if not 1 <= slots <= store.pages:
            raise InputError(f"a pinned level of {slots} slots: choose 1 to {store.pages}, the pages of its store")
        self.layout, self.pages, self.page_bytes = store.layout, store.pages, store.page_bytes
        self.hits = self.misses = 0
        self._store = store
        self._locked = LockedMemory(slots, self.page_bytes)
        self._free = list(self._locked.memory)
        self._held: OrderedDict[tuple[int, int], _Held] = OrderedDict()  # the least recently leased first
        self._closed = False
        self._changed = Condition()

    @contextmanager
    def lease(self, layer: int, expert: int) -> Iterator[torch.Tensor]:
        """The page, ``[page_bytes]`` uint8, there until the block ends; a GPU's copy of it has to end before.

        An absent page is read by the calling thread, or waited for where another thread is reading it. Where every slot
        is leased, this waits for one: a thread that leases several pages at a time needs slots for all threads'.

        Raises:
            IndexError: if the store has no such page.
            Exception: what the store raised, if the page cannot be read in this thread. The next lease tries again.
            OSError: if it could not be read in the thread waited for, or the level is closed.
        """
        if not (0 <= layer < self.layout.layers and 0 <= expert < self.layout.experts):
            raise IndexError(f"the store has no page of layer {layer}, expert {expert}")
        held, absent = self._enter((layer, expert))
        try:
            if absent:
                self._read((layer, expert), held)
            else:
                with self._changed:
                    self._changed.wait_for(lambda: held.arrived or held.failure)
                if held.failure:
                    raise OSError(f"the read of layer {layer}, expert {expert} failed: {held.failure}")
            yield held.page
        finally:
            with self._changed:
                held.leases -= 1
                self._changed.notify_all()

    def offset(self, layer: int, expert: int) -> int:
        """First byte of a page, as the store counts."""
        return self._store.offset(layer, expert)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Copy ``len(buffer)`` bytes of one page, at the store's ``offset``; counted as one lease, whatever its length.

        Raises:
            ValueError: if they reach beyond the page.
            Exception: as ``lease``.
        """
        index, start = divmod(offset - self._store.offset(0, 0), self.page_bytes)
        if start + len(buffer) > self.page_bytes:
            raise ValueError(f"{len(buffer)} bytes from byte {start} of a page reach beyond its {self.page_bytes}")
        with self.lease(*divmod(index, self.layout.experts)) as page:
            _copy(page.numpy()[start : start + len(buffer)], buffer)

    def close(self) -> None:
        """Unlock the memory, which goes with its last view; a second call does nothing.

        It waits for no lease: end them first. One that waits for a slot, or comes later, raises OSError.
        """
        with self._changed:
            self._closed = True
            self._held.clear()
            self._free.clear()
            self._changed.notify_all()
        self._locked.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _enter(self, key: tuple[int, int]) -> tuple[_Held, bool]:
        """Lease a page, and whether it is this thread's to read."""
        with self._changed:
            while not self._closed:
                if held := self._held.get(key):
                    self._held.move_to_end(key)
                    held.leases += 1
                    self.hits += 1
                    return held, False
                if (page := self._vacate()) is not None:
                    held = self._held[key] = _Held(page)
                    self.misses += 1
                    return held, True
                self._changed.wait()
        raise OSError("this pinned level is closed")

    def _vacate(self) -> torch.Tensor | None:
        """A slot that holds nothing any more; None while all are leased."""
        if self._free:
            return self._free.pop()
        idle = (key for key, held in self._held.items() if not held.leases)
        return None if (key := next(idle, None)) is None else self._held.pop(key).page

    def _read(self, key: tuple[int, int], held: _Held) -> None:
        try:
            buffer = memoryview(held.page.numpy())
            self._store.read_into(buffer, self._store.offset(*key))
            self._store.check(*key, buffer)
            with self._changed:
                held.arrived = True
                self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                if not held.arrived:  # else this is a Ctrl-C, and the page may be in use already
                    held.failure = repr(error)  # not the error: its traceback would hold the memory in a cycle
                    if not self._closed:
                        del self._held[key]
                        self._free.append(held.page)
                self._changed.notify_all()
            raise


def _copy(source: np.ndarray, buffer: memoryview) -> None:
    np.frombuffer(buffer, np.uint8)[:] = source  # numpy's copy lets other threads run; a memoryview's does not
