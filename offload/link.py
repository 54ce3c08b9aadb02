"""Link: reader threads that bring pages from the store into slots, several reads in flight, paced if asked."""

import queue
import threading
import time
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

from cachemoe.offload.store import ExpertStore

CHUNK_BYTES = 1 << 20  # a page is read in chunks, so that a single miss keeps several requests in flight too
DEPTH = 4  # reads in flight


@dataclass(frozen=True)
class Pacing:
    """A slower link than the machine's own; it delays the end of real reads, never replaces them.

    Args:
        bytes_per_second: byte rate of the link.
        latency: seconds for each page requested.
    """

    bytes_per_second: float
    latency: float = 0.0


class _Page:
    """One page on its way, chunk by chunk."""

    def __init__(self, tag, chunks: int, not_before: float, landed: queue.SimpleQueue):
        self.tag = tag
        self.error: BaseException | None = None
        self.cancelled = False
        self.ended = threading.Event()  # no reader writes the buffer any more
        self._chunks_left = chunks
        self._not_before = not_before
        self._landed = landed
        self._lock = threading.Lock()

    def chunk_ended(self, error: BaseException | None) -> None:
        """Note the end of a chunk; the last one reports the page, not before the paced link would have carried it."""
        with self._lock:
            self._chunks_left -= 1
            self.error = self.error or error
            last = self._chunks_left == 0
        if last:
            if not self.cancelled:
                time.sleep(max(0.0, self._not_before - time.monotonic()))
            self.ended.set()
            self._landed.put(self)


class Arrivals:
    """Pages under way, iterated in the order they land. Use it as a context manager: leaving waits for the readers.

    Iterating gives the tag of each page that arrived, and raises in the caller what ended a read that failed. After the
    context no read writes any of the slots; those whose page was not iterated hold nothing to rely on.
    """

    def __init__(self, link: "Link", landed: queue.SimpleQueue, pages: list[_Page]):
        self._link = link
        self._landed = landed
        self._pages = pages

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            for page in self._pages:
                page.cancelled = True
            for page in self._pages:
                page.ended.wait()
        except BaseException:  # a second Ctrl-C: readers may still be writing, so nothing may be fetched again
            self._link.broken = True
            raise

    def __iter__(self) -> Iterator:
        for _ in self._pages:
            page = self._landed.get()
            if page.error is not None:
                raise page.error
            yield page.tag


class Link:
    """Reader threads over one store. Close it, or use it as a context manager; closing joins the threads.

    Args:
        store: where pages come from.
        pacing: None for the machine's own speed.
        depth: reads in flight.

    Attributes:
        broken: set when an interrupt left reads that nobody waits for; the link then refuses to fetch.
    """

    def __init__(self, store: ExpertStore, pacing: Pacing | None = None, depth: int = DEPTH):
        self.store = store
        self.pacing = pacing
        self.broken = False
        self._free_at = 0.0
        self._chunks: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._read, name=f"cachemoe-read-{i}") for i in range(depth)]
        for thread in self._threads:
            thread.daemon = True  # Ctrl-C between start and close must not hang the interpreter's exit
            thread.start()

    def fetch(self, requests: Iterable[tuple[int, int, memoryview, Hashable]], paced: bool = True) -> Arrivals:
        """Ask for pages; returns at once.

        Args:
            requests: (layer, expert, the slot's bytes, tag) of each page. The bytes belong to the readers until the
                page has been iterated or the ``Arrivals`` left; the tag is what iterating gives.
            paced: False for pages that are not part of what is measured.

        Raises:
            RuntimeError: if an interrupt broke the link.
        """
        if self.broken:
            raise RuntimeError("an interrupt left reads under way on this link: make a new engine")
        landed: queue.SimpleQueue = queue.SimpleQueue()
        pages: list[_Page] = []
        try:
            for layer, expert, buffer, tag in requests:
                offset = self.store.offset(layer, expert)
                starts = range(0, len(buffer), CHUNK_BYTES)
                page = _Page(tag, len(starts), self._reserve(len(buffer)) if paced else 0.0, landed)
                pages.append(page)
                for start in starts:
                    self._chunks.put((page, buffer[start : start + CHUNK_BYTES], offset + start))
        except BaseException:  # Ctrl-C in the middle: what has been asked for is not known to the caller
            self.broken = True
            for page in pages:
                page.cancelled = True
            raise
        return Arrivals(self, landed, pages)

    def close(self) -> None:
        """End the threads after the reads already asked for; a second call does nothing."""
        threads, self._threads = self._threads, []
        for _ in threads:
            self._chunks.put(None)
        for thread in threads:
            thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _reserve(self, size: int) -> float:
        """When the paced link, one request after another, will have carried ``size`` more bytes."""
        if self.pacing is None:
            return 0.0
        start = max(self._free_at, time.monotonic())
        self._free_at = start + self.pacing.latency + size / self.pacing.bytes_per_second
        return self._free_at

    def _read(self) -> None:
        while (request := self._chunks.get()) is not None:
            page, buffer, offset = request
            error = None
            try:
                if not page.cancelled:
                    self.store.read_into(buffer, offset)
            except BaseException as failure:  # handed to the caller, who raises it
                error = failure
            page.chunk_ended(error)
