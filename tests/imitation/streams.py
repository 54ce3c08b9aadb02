"""Streams, events and graphs: when the work that a program asks for is done.

Work is a function without arguments. A device's default stream does it at once, any other stream as late as it may, and
a graph each time it is replayed.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

import torch

from imitation.memory import LockedMemory

DEVICES = 2
NOT_THE_PROGRAM = ("/imitation/", "/torch/", "/contextlib.py")  # files of frames that say nothing of who asked


class Machine:
    """What all threads share of the GPUs, and what each has for itself.

    Attributes:
        lock: held while work is added or done: one thread at a time does so.
        streams: of each device, the default one first.
        capture: the graph that is being captured, or None.
        captures_on: the device of torch's own stream for captures, once there is one.
        waits: what the host has waited for, and where; never within a capture, where waiting raises.
        locked: the host's page-locked memory.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self.streams: list[list[Stream]] = [[] for _ in range(DEVICES)]
        self.capture: Graph | None = None
        self.captures_on: torch.device | None = None
        self.waits: list[str] = []
        self.locked = LockedMemory()
        self.of_thread = _OfThread()

    def start(self) -> None:
        """Make the default streams."""
        for index in range(DEVICES):
            DefaultStream(torch.device("cuda", index))


class _OfThread(threading.local):
    def __init__(self):
        self.device = 0
        self.streams: dict[int, Stream] = {}  # by device, where it is not the default one


_machine: Machine | None = None


def machine() -> Machine:
    """The machine while it is imitated."""
    if _machine is None:
        raise RuntimeError("the imitated GPU is gone")
    return _machine


@contextmanager
def started_machine() -> Iterator[Machine]:
    """A new machine for as long as it is open."""
    global _machine
    _machine = Machine()
    try:
        _machine.start()
        yield _machine
    finally:
        _machine = None


def device_of(device: torch.device | str | int | None) -> torch.device:
    """A device with its number; where none is named, the thread's current one."""
    index = device if isinstance(device, int) or device is None else torch.device(device).index
    return torch.device("cuda", machine().of_thread.device if index is None else index)


def place() -> str:
    """The line of the program that is being run."""
    frame = sys._getframe(1)
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in NOT_THE_PROGRAM):
        frame = frame.f_back
    return f"{'/'.join(frame.f_code.co_filename.split('/')[-2:])}:{frame.f_lineno}"


def refuse_in_capture(what: str) -> None:
    """Raise, whichever thread asks, while a graph is captured."""
    if machine().capture is not None:
        machine().capture.broken = True
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}, at {place()}")


def host_waits(what: str) -> None:
    """Note that the host waits for a device; it may not while a graph is captured."""
    refuse_in_capture(f"a host wait ({what})")
    machine().waits.append(f"{what}, at {place()}")


class Stream:
    """As ``torch.cuda.Stream``: keeps its work until something waits for it.

    Attributes:
        fresh: addresses of memory made for results of work that has not been done.
    """

    eager = False

    def __init__(self, device=None, priority: int = 0):
        self.device = device_of(device)
        self.cuda_stream = id(self)
        self.fresh: set[int] = set()
        self._work: deque[Callable[[], None]] = deque()
        machine().streams[self.device.index].append(self)

    def submit(self, work: Callable[[], None]) -> None:
        """Do it, now or later."""
        with machine().lock:
            self._work.append(work)

    def finish(self, until: Occurrence | None = None) -> None:
        """Do the work that has been kept, all of it or up to an event."""
        with machine().lock, torch.no_grad():
            while self._work and not (until and until.happened):
                self._work.popleft()()
            if not self._work:
                self.fresh.clear()

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        if event.last is not None:  # CUDA, too, takes an event that was never recorded for one that has happened
            self.submit(event.last.finish)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def query(self) -> bool:
        refuse_in_capture("whether a stream has ended")
        return not self._work

    def synchronize(self) -> None:
        host_waits("for a stream")
        self.finish()


class DefaultStream(Stream):
    """A device's default stream, which is never behind the host."""

    eager = True

    def submit(self, work: Callable[[], None]) -> None:
        with machine().lock:
            work()


class Graph(Stream):
    """As ``torch.cuda.CUDAGraph``: a stream that keeps its work for good, and does it at each replay.

    Attributes:
        broken: whether something was done that no capture survives.
    """

    broken = False

    def __init__(self, keep_graph: bool = False):
        super().__init__()

    def submit(self, work: Callable[[], None]) -> None:
        if machine().capture is not self:
            raise RuntimeError("a graph's stream is used after its capture")
        self._work.append(work)

    def finish(self, until: Occurrence | None = None) -> None:
        """Nothing: no work of a capture is ever waited for."""

    def wait_event(self, event: Event) -> None:
        if event.last is not None and event.last.stream is not self:
            raise RuntimeError("CUDA error: dependency created on uncaptured work in another stream")

    def replay(self) -> None:
        current_stream(self.device).submit(self._run)

    def reset(self) -> None:
        self._work.clear()

    def _run(self) -> None:
        with torch.no_grad():
            for work in self._work:
                work()


class Occurrence:
    """An event as it was recorded once; it may be recorded again.

    Attributes:
        at: seconds of ``perf_counter``, once it has happened.
    """

    def __init__(self, stream: Stream):
        self.stream = stream
        self.at: float | None = None

    @property
    def happened(self) -> bool:
        return self.at is not None

    def happen(self) -> None:
        self.at = perf_counter()

    def finish(self) -> None:
        self.stream.finish(self)


class Event:
    """As ``torch.cuda.Event``.

    Attributes:
        last: as it was recorded last.
    """

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False):
        self._timing = enable_timing
        self.last: Occurrence | None = None

    @property
    def device(self) -> torch.device | None:
        return None if self.last is None else self.last.stream.device

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or current_stream()
        self.last = Occurrence(stream)
        stream.submit(self.last.happen)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        refuse_in_capture("whether an event has happened")
        return self.last is None or self.last.happened

    def synchronize(self) -> None:
        host_waits("for an event")
        if self.last is not None:
            self.last.finish()

    def elapsed_time(self, end: Event) -> float:
        if not (self._timing and end._timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self.last is None or end.last is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        if self.device != end.device:
            raise RuntimeError(f"CUDA error: invalid resource handle: events of {self.device} and {end.device}")
        if not (self.last.happened and end.last.happened):
            raise RuntimeError("CUDA error: device not ready: an event has not happened yet")
        return (end.last.at - self.last.at) * 1e3


def current_stream(device: torch.device | str | int | None = None) -> Stream:
    """As ``torch.cuda.current_stream``."""
    index = device_of(device).index
    return machine().of_thread.streams.get(index) or machine().streams[index][0]


@contextmanager
def current_device(device: torch.device | str | int | None) -> Iterator[None]:
    """As ``torch.cuda.device``."""
    thread = machine().of_thread
    before, thread.device = thread.device, device_of(device).index
    try:
        yield
    finally:
        thread.device = before


@contextmanager
def used_stream(stream: Stream | None) -> Iterator[None]:
    """As ``torch.cuda.stream``."""
    if stream is None:
        yield
        return
    streams, index = machine().of_thread.streams, stream.device.index
    with current_device(index):
        before, streams[index] = streams.get(index), stream
        try:
            yield
        finally:
            streams[index] = before


def set_stream(stream: Stream) -> None:
    """As ``torch.cuda.set_stream``."""
    machine().of_thread.device = stream.device.index
    machine().of_thread.streams[stream.device.index] = stream


@contextmanager
def captured(graph: Graph, pool=None, stream=None, capture_error_mode: str = "global") -> Iterator[None]:
    """As ``torch.cuda.graph``, which leaves its own stream behind when it cannot end a broken capture."""
    synchronize()
    if stream is None:
        machine().captures_on = machine().captures_on or device_of(None)
    graph.device = machine().captures_on if stream is None else stream.device
    device, before = device_of(None), current_stream(graph.device)
    machine().capture = graph
    set_stream(graph)
    try:
        yield
    finally:
        machine().capture = None
        if graph.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        set_stream(before)
        machine().of_thread.device = device.index


def is_capturing() -> bool:
    """As ``torch.cuda.is_current_stream_capturing``."""
    return current_stream() is machine().capture is not None


def synchronize(device: torch.device | str | int | None = None) -> None:
    """As ``torch.cuda.synchronize``."""
    host_waits("for the device")
    for stream in tuple(machine().streams[device_of(device).index]):
        stream.finish()
