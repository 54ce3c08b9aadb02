"""What moves a chunk of a page from the store into a frame: a read into DRAM, or a copy to a GPU on its own stream."""

import threading
from collections import deque
from typing import Protocol

import torch

from cachemoe.kernels.formats import PAGE_ALIGNMENT
from cachemoe.offload.pool import ExpertPool
from cachemoe.offload.store import PinnedPages, Store

READERS = 4  # reads in flight that a disk needs to reach its bandwidth
CHUNK_BYTES = 1 << 20  # about so much: a single miss keeps several readers busy, a demand overtakes a prefetch
LEAST_CHUNK_BYTES = 1 << 18


def chunk_size(page_bytes: int, threads: int) -> int:
    """Bytes of the pieces in which a page moves: so many that all threads end together, near ``CHUNK_BYTES`` each.

    Returns:
        A multiple of 4 KiB.
    """
    pieces = threads * max(1, round(page_bytes / threads / CHUNK_BYTES))
    return max(-(-page_bytes // pieces // PAGE_ALIGNMENT) * PAGE_ALIGNMENT, LEAST_CHUNK_BYTES)


class Carrier(Protocol):
    """How a link moves chunks; what a kind of it has no need of does nothing, as here.

    Attributes:
        threads: that may carry at the same time.
        track: what their lanes in a timeline are called.
        page_bytes: of each page.
        chunk_bytes: of the pieces in which a page moves, a multiple of 4 KiB.
    """

    threads: int
    track: str
    page_bytes: int
    chunk_bytes: int

    def prepare(self, transfer) -> None:
        """Called in the engine's thread when a page is asked for."""

    def carry(self, transfer, start: int, stop: int) -> None:
        """Move bytes ``start`` to ``stop``, in one of the link's threads; what it raises reaches the engine."""

    def check(self, transfer) -> None:
        """See that a page is whole, in the link's thread that carried the last of it; what it raises ends the page."""

    def drain(self) -> None:
        """Wait until all that has been carried has arrived."""

    def busy_s(self) -> float | None:
        """Seconds spent moving, by the device's own clock; None where the link's threads can tell."""

    def use(self, transfer) -> None:
        """Called in the engine's thread before it computes with a page that has landed."""

    def record(self, timeline, name: str, transfer, began: float, ended: float, **details) -> None:
        """Show the chunk just carried in a timeline; ``began`` and ``ended`` are the link's thread's."""


class ReadCarrier(Carrier):
    """Reads of a store's file, or of its memory, into a pool in DRAM: a read has arrived when it returns.

    Args:
        store: where the pages are.
        pool: whose frames are filled.
    """

    threads = READERS
    track = "read"

    def __init__(self, store: Store, pool: ExpertPool):
        self._store, self._pool = store, pool
        self.page_bytes = store.page_bytes
        self.chunk_bytes = chunk_size(self.page_bytes, self.threads)

    def carry(self, transfer, start: int, stop: int) -> None:
        buffer = self._pool.buffer(transfer.frame)[start:stop]
        self._store.read_into(buffer, self._store.offset(transfer.layer, transfer.expert) + start)

    def check(self, transfer) -> None:
        self._store.check(transfer.layer, transfer.expert, self._pool.buffer(transfer.frame))

    def record(self, timeline, name: str, transfer, began: float, ended: float, **details) -> None:
        timeline.span(threading.current_thread().name, name, began, ended, **details)


class CopyCarrier(Carrier):
    """Copies from pinned memory, on the way into which pages are checked, to a pool on a GPU, on a stream of their own.

    A page has landed once its copy is queued: ``use`` makes the current stream wait for the copy's event, so that the
    host does not.

    Args:
        store: that lends its pages.
        pool: whose frames are filled.
    """

    threads = 1  # one copy engine serves this direction
    track = "copy"

    def __init__(self, store: PinnedPages, pool: ExpertPool):
        self._store, self._pool = store, pool
        self.page_bytes = self.chunk_bytes = store.page_bytes  # each piece costs the host a launch and two events
        self._device = pool.pages.device
        self._stream = torch.cuda.Stream(self._device)
        self._last: torch.cuda.Event | None = None
        self._copies: deque = deque()  # (begin, end) of those not counted yet
        self._busy_s = 0.0

    def prepare(self, transfer) -> None:
        # What was queued before may still read the frame.
        transfer.frame_free = torch.cuda.current_stream(self._device).record_event()

    def carry(self, transfer, start: int, stop: int) -> None:
        # The lease is held until the copy has left the host's page; pages of a PinnedStore cost nothing to lease.
        with self._store.lease(transfer.layer, transfer.expert) as page, torch.cuda.stream(self._stream):
            self._stream.wait_event(transfer.frame_free)
            began = self._stream.record_event(torch.cuda.Event(enable_timing=True))
            self._pool.pages[transfer.frame, start:stop].copy_(page[start:stop], non_blocking=True)
            transfer.copying, transfer.copied = began, self._stream.record_event(torch.cuda.Event(enable_timing=True))
            self._copies.append((began, transfer.copied))
            queued, self._last = self._last, transfer.copied
            # What is queued cannot be overtaken: at most two copies are, of prefetches one. A page of a bounded level
            # must stay until it is copied.
            wait_for = queued if transfer.demand and self._store.permanent else transfer.copied
            if wait_for is not None:
                wait_for.synchronize()

    def drain(self) -> None:
        self._stream.synchronize()

    def busy_s(self) -> float:
        while self._copies and self._copies[0][1].query():
            began, ended = self._copies.popleft()
            self._busy_s += began.elapsed_time(ended) / 1e3
        return self._busy_s

    def use(self, transfer) -> None:
        torch.cuda.current_stream(self._device).wait_event(transfer.copied)

    def record(self, timeline, name: str, transfer, began: float, ended: float, **details) -> None:
        timeline.cuda_span(self.track, name, transfer.copying, transfer.copied, **details)


def carrier_of(store: Store, pool: ExpertPool) -> Carrier:
    """What moves the store's pages to where the pool is; to a GPU the store must lend them, as ``PinnedPages``."""
    return CopyCarrier(store, pool) if pool.pages.is_cuda else ReadCarrier(store, pool)
