"""Link: pages on their way from the store into frames of the pool, demand before prefetch, paced if asked."""

import os
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

from cachemoe.offload.carriers import Carrier
from cachemoe.offload.errors import InputError
from cachemoe.offload.timeline import Timeline

DEMAND, PREFETCH, BACKGROUND = "demand", "prefetch", "background"
PACED_THREADS = 2  # one moves the next chunk while the other waits for the end of the last


@dataclass(frozen=True)
class Pacing:
    """A slower link than the machine's own; it delays the end of real transfers, never replaces them.

    Args:
        bytes_per_second: byte rate of the link.
        latency: seconds for each page requested.
    """

    bytes_per_second: float
    latency: float = 0.0

    def seconds(self, size: int, begins: bool) -> float:
        """What ``size`` bytes take, with the latency where a page begins."""
        return size / self.bytes_per_second + (self.latency if begins else 0.0)


class Transfer:
    """One page on its way. Until it has landed its frame is the link's.

    Attributes:
        layer, expert, level: the page.
        frame: where it goes, in the pool of its level.
        cause: what it was asked for by: ``DEMAND``, ``PREFETCH`` or ``BACKGROUND``.
        demand: whether somebody waits for it now.
        landed: whether it has ended, well or not; on a GPU, whether the copy is queued.
        error: what ended it, if it failed.
    """

    def __init__(self, layer: int, expert: int, level: int, frame: int, cause: str, paced: bool, carrier: Carrier):
        self.layer, self.expert, self.level, self.frame = layer, expert, level, frame
        self.cause, self.demand, self.paced, self.carrier = cause, cause == DEMAND, paced, carrier
        self.landed = False
        self.error: BaseException | None = None
        self.asked = time.perf_counter()
        # Of a copy to a GPU: from when its frame is free, and the beginning and end of the last chunk.
        self.frame_free = self.copying = self.copied = None
        self.next_byte = 0  # the first that no thread has taken
        self.moving = 0  # chunks under way
        self.carried = 0  # bytes that are there
        self.waiter: SimpleQueue[Transfer] | None = None  # told when the transfer lands


class Link:
    """Threads that move pages; a page whose move has begun is moved whole. Close it, or use it as a context manager.

    A demand finds a thread that no prefetch holds, or waits for one chunk of a prefetch at most.

    Ctrl-C comes to the caller's thread alone, at any of Python's instructions. There the lock is taken as it is, in C,
    and never by a condition's ``__enter__``, within which an interrupt would leave it locked; and what lands is waited
    for in a ``SimpleQueue``.

    Args:
        carriers: move chunks, one the pages of each level.
        pacing: None for the machine's own speed.
        timeline: records each chunk, if given.

    Attributes:
        broken: set when an interrupt left transfers that nobody waits for; the link then refuses requests, until
            ``abandon``.

    Raises:
        InputError: if the system refuses a thread.
    """

    def __init__(
        self,
        carriers: Sequence[Carrier],
        pacing: Pacing | None = None,
        timeline: Timeline | None = None,
    ):
        self.broken = False
        self.pacing = pacing
        self._carriers, self._timeline = carriers, timeline
        self._queues: dict[bool, deque[Transfer]] = {True: deque(), False: deque()}  # by whether it is a demand
        self._moving: set[Transfer] = set()  # with chunks under way
        self._closed = False
        self._free_at = 0.0
        self._moved_bytes, self._busy_s, self._busy_since = 0, 0.0, 0.0
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # on which the link's own threads wait
        self._closing = threading.Event()
        self._process = os.getpid()
        _LINKS.add(self)
        threads = carriers[0].threads
        count = min(threads, PACED_THREADS) if pacing else threads
        self._most_prefetches = max(1, count - 1)
        self._threads = []
        try:
            for i in range(count):  # daemons: Ctrl-C between start and close must not hang the interpreter's exit
                thread = threading.Thread(target=self._run, name=f"{carriers[0].track} {i}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError as error:
            self.close()
            raise InputError(
                f"the system refuses a thread that reads pages ({error}): end other programs, or raise `ulimit -u`"
            ) from error

    def request(
        self, layer: int, expert: int, frame: int, level: int = 0, cause: str = DEMAND, paced: bool = True
    ) -> Transfer:
        """Ask for a page; returns at once.

        Args:
            layer, expert: the page.
            frame: where it goes; nobody else may touch it before the transfer has landed.
            level: of the page.
            cause: all but ``DEMAND`` wait for all demands.
            paced: False for a page that is not part of what is measured.

        Raises:
            RuntimeError: if an interrupt has broken the link, or it is closed.
            InputError: in a process that was forked off, where the link's threads are not.
        """
        self._check_process()
        if self._closed:
            raise RuntimeError("the link is closed: make a new engine")
        if self.broken:
            raise RuntimeError("the link was broken by an interrupt, and nobody has abandoned what it left")
        transfer = Transfer(layer, expert, level, frame, cause, paced, self._carriers[level])
        with self._breaking:
            transfer.carrier.prepare(transfer)
            with self._lock:
                self._queues[transfer.demand].append(transfer)
                self._work.notify_all()
        return transfer

    def promote(self, transfer: Transfer) -> None:
        """Make a prefetch a demand."""
        with self._breaking, self._lock:
            if transfer in self._queues[False]:
                self._queues[False].remove(transfer)  # first: in both queues it would move twice
                self._queues[True].append(transfer)
            transfer.demand = True
            self._work.notify_all()

    def cancel(self, transfer: Transfer) -> bool:
        """Take a transfer back if no byte of it has moved; whether that was so."""
        with self._breaking, self._lock:
            queue = self._queues[transfer.demand]
            if transfer.next_byte or transfer not in queue:
                return False
            queue.remove(transfer)
            transfer.landed = True
            return True

    def landed(self, transfers: Iterable[Transfer]) -> Iterator[Transfer]:
        """The transfers in the order they land.

        Raises:
            Exception: what ended one that failed.
        """
        for transfer in self._ended(transfers):
            if transfer.error is not None:
                raise transfer.error
            transfer.carrier.use(transfer)
            yield transfer

    def abandon(self) -> None:
        """See that no frame is written any more: cancel what has not begun to move, wait for the rest.

        After that a link that an interrupt has broken takes requests again.
        """
        with self._breaking:
            with self._lock:
                for queue in self._queues.values():
                    for transfer in [transfer for transfer in queue if not transfer.next_byte]:
                        queue.remove(transfer)
                        transfer.landed = True
                moving = self._moving.union(*self._queues.values())
            for _ in self._ended(moving):
                pass
            self._drain()
            self.broken = False

    def _ended(self, transfers: Iterable[Transfer]) -> Iterator[Transfer]:
        """The transfers in the order in which they end, well or not."""
        self._check_process()
        transfers, ended = list(transfers), SimpleQueue()
        with self._lock:
            for transfer in transfers:
                if transfer.landed:
                    ended.put(transfer)
                else:
                    transfer.waiter = ended
        for _ in transfers:
            yield ended.get()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise InputError(
                "this process was forked off after its model or engine was made, and the threads that read pages "
                "stayed behind: load the model in this process, or start the process by spawn"
            )

    @property
    @contextmanager
    def _breaking(self) -> Iterator[None]:
        """Ctrl-C within: what was asked for, and whether threads still write, is not known to the caller any more."""
        try:
            yield
        except BaseException:
            self.broken = True
            raise

    @property
    def queued_bytes(self) -> int:
        """Of all pages asked for, what no thread has taken."""
        with self._lock:
            waiting = (transfer for queue in self._queues.values() for transfer in queue)
            return sum(transfer.carrier.page_bytes - transfer.next_byte for transfer in waiting)

    @property
    def busy_s(self) -> float:
        """Seconds with a chunk under way, so far."""
        with self._lock:
            if (measured := [carrier.busy_s() for carrier in self._carriers])[0] is not None:
                return sum(measured)
            now = time.perf_counter() if self._moving else self._busy_since
            return self._busy_s + now - self._busy_since

    @property
    def bytes_per_second(self) -> float | None:
        """As measured while busy, and no more than it is paced to; None before the first chunk has landed."""
        busy = self.busy_s
        if not self._moved_bytes or not busy:
            return None
        return min(self._moved_bytes / busy, self.pacing.bytes_per_second if self.pacing else float("inf"))

    def close(self) -> None:
        """Drop what has not begun to move, wait for the rest to arrive, end the threads; a second call does nothing."""
        with self._lock:
            self._closed = True
            self._closing.set()
            for queue in self._queues.values():
                while queue:
                    transfer = queue.popleft()
                    transfer.error = RuntimeError("the link was closed before the page had landed")
                    if not transfer.moving:
                        self._land(transfer)
            self._work.notify_all()
        threads, self._threads = self._threads, []
        for thread in threads:
            thread.join()
        if threads:
            self._drain()  # what is only queued may still write to frames that are freed now

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _take(self) -> tuple[Transfer, int, int, float] | None:
        """The next chunk, its first and last byte, and when a paced link will have carried it; None when closed."""
        with self._work:
            while True:
                if self._closed:
                    return None
                if self._queues[True]:
                    queue = self._queues[True]
                    break
                ahead = sum(transfer.moving for transfer in self._moving if not transfer.demand)
                if self._queues[False] and ahead < self._most_prefetches:
                    queue = self._queues[False]
                    break
                self._work.wait()
            transfer = queue[0]
            carrier, start = transfer.carrier, transfer.next_byte
            stop = min(start + carrier.chunk_bytes, carrier.page_bytes)
            transfer.next_byte = stop
            if stop == carrier.page_bytes:
                queue.popleft()
            if not self._moving:
                self._busy_since = time.perf_counter()
            transfer.moving += 1
            self._moving.add(transfer)
            end = 0.0
            if self.pacing and transfer.paced:
                # From when it was asked for, not from now: a thread that wakes late must not slow the link further.
                end = max(self._free_at, transfer.asked) + self.pacing.seconds(stop - start, start == 0)
                self._free_at = end
            return transfer, start, stop, end

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            transfer, start, stop, end = taken
            carrier, began, error = transfer.carrier, time.perf_counter(), None
            try:
                carrier.carry(transfer, start, stop)
                with self._lock:
                    transfer.carried += stop - start
                    whole = transfer.carried == carrier.page_bytes
                if whole:
                    carrier.check(transfer)
                if (left := end - time.perf_counter()) > 0:
                    carrier.drain()
                    self._closing.wait(left)
                if self._timeline is not None:
                    self._record(transfer, stop - start, began)
            except BaseException as failure:  # handed to the caller, who raises it
                traceback.clear_frames(failure.__traceback__)  # which would hold the frame's memory
                error = failure
            with self._lock:
                self._count(transfer, stop - start, error)

    def _count(self, transfer: Transfer, size: int, error: BaseException | None) -> None:
        """A chunk's end; that of the last, or of the last under way after a failure, is the page's."""
        now = time.perf_counter()
        transfer.moving -= 1
        if not transfer.moving:
            self._moving.remove(transfer)
        if error is None:
            self._moved_bytes += size
        if not self._moving:
            self._busy_s += now - self._busy_since
            self._busy_since = now
        if error is not None and transfer.error is None:
            transfer.error = error
            for queue in self._queues.values():
                if transfer in queue:
                    queue.remove(transfer)
        done = transfer.error is not None or transfer.next_byte == transfer.carrier.page_bytes
        if done and not transfer.moving:
            self._land(transfer)
        if not transfer.demand:
            self._work.notify_all()  # another thread may take a prefetch

    def _land(self, transfer: Transfer) -> None:
        """The transfer has ended: tell whoever waits for it."""
        transfer.landed = True
        if transfer.waiter is not None:
            transfer.waiter.put(transfer)

    def _record(self, transfer: Transfer, size: int, began: float) -> None:
        """Show a chunk in the timeline."""
        kind, name = DEMAND if transfer.demand else transfer.cause, f"layer {transfer.layer} expert {transfer.expert}"
        details = {"layer": transfer.layer, "expert": transfer.expert, "bytes": size, "kind": kind}
        transfer.carrier.record(self._timeline, name, transfer, began, time.perf_counter(), **details)

    def _drain(self) -> None:
        for carrier in self._carriers:
            carrier.drain()

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)


_LINKS: weakref.WeakSet[Link] = weakref.WeakSet()
# A thread that is not in a forked process may have held a lock; what needs the thread then raises.
os.register_at_fork(after_in_child=lambda: [link._renew_lock() for link in _LINKS])
