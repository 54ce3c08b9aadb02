"""Timeline: what ran when, written as a Chrome trace that Perfetto and chrome://tracing open."""

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from cachemoe.offload.files import whole_file

LIMIT = 200_000  # spans; about 70 MB of memory, 30 MB of file
PID = 1


@dataclass(frozen=True)
class Span:
    """One span; ``start`` and ``end`` in seconds of ``time.perf_counter``, whichever clock measured them."""

    track: str
    name: str
    start: float
    end: float
    details: dict


@dataclass(frozen=True)
class Mark:
    """An instant, ``at`` seconds of ``time.perf_counter``."""

    name: str
    at: float


class Timeline:
    """A recorder of spans. Any number of threads may record at once; nothing is formatted until it is read.

    Args:
        cuda: whether ``cuda_span`` will be used. It waits for the current device to be idle, to read both clocks at
            once; they drift apart, so make the timeline shortly before what it records.
        limit: spans kept. What is recorded beyond it is dropped and counted; marks, which are few, are all kept.

    Attributes:
        dropped: spans recorded beyond the limit.
    """

    def __init__(self, cuda: bool = False, limit: int = LIMIT):
        self.limit = limit
        self.dropped = 0
        self._lock = threading.Lock()
        self._spans: list[tuple] = []
        self._marks: list[tuple] = []
        self._cuda_base = _cuda_base() if cuda else None

    def span(self, track: str, name: str, start: float, end: float, **details) -> None:
        """Record one span, in any order; those of one track should follow one another or nest, as viewers demand.

        Args:
            track: the lane it is drawn in, such as "route", "compute", "stall", "read 0" or "copy".
            name: what ran.
            start, end: seconds of ``time.perf_counter``.
            details: what JSON can hold. ``kind="demand"`` or ``"prefetch"`` says why a page was moved, and
                ``used=True`` or ``False`` whether a prefetched one was needed, where that is known by now.
        """
        self._keep((track, name, start, end, details, False))

    def cuda_span(self, track: str, name: str, start_event, end_event, **details) -> None:
        """As ``span``, between two ``torch.cuda.Event(enable_timing=True)`` recorded on the timeline's device.

        The timeline holds on to the events: they must not be recorded again before it is read.

        Raises:
            RuntimeError: if the timeline was made without ``cuda``.
        """
        if self._cuda_base is None:
            raise RuntimeError("this timeline cannot place CUDA events: make it with cuda=True")
        self._keep((track, name, start_event, end_event, details, True))

    def mark(self, name: str, at: float) -> None:
        """Record an instant, such as "token 3" where it begins, at ``at`` seconds of ``time.perf_counter``."""
        with self._lock:
            self._marks.append((name, at))

    def spans(self) -> list[Span]:
        """The spans in the order recorded. Waits for the CUDA events among them.

        Raises:
            RuntimeError, ValueError: if a CUDA event was made without timing, never recorded, or on another device.
        """
        with self._lock:
            recorded = list(self._spans)
        resolved = []
        event, at = self._cuda_base or (None, 0.0)
        for track, name, start, end, details, on_cuda in recorded:
            if on_cuda:
                start.synchronize()
                end.synchronize()
                # From one event to the next: elapsed_time is a float32, which is microseconds off after minutes.
                at += event.elapsed_time(start) / 1e3
                event = start
                start, end = at, at + start.elapsed_time(end) / 1e3
            resolved.append(Span(track, name, start, end, details))
        return resolved

    def marks(self) -> list[Mark]:
        """The marks in the order recorded."""
        with self._lock:
            return [Mark(*mark) for mark in self._marks]

    def write(self, path: Path) -> None:
        """Write the Chrome trace, times relative to the earliest span or mark; spans dropped are counted in it.

        Raises:
            OSError: if the file cannot be written.
            RuntimeError: as ``spans``.
            TypeError: if a detail is nothing that JSON can hold.
            ValueError: if a span ends before it starts or a detail is not finite; and as ``spans``.
        """
        trace = {
            "traceEvents": _trace_events(self.spans(), self.marks()),
            "displayTimeUnit": "ms",
            "otherData": {"limit": self.limit, "dropped": self.dropped},
        }
        text = json.dumps(trace, allow_nan=False)
        with whole_file(path) as partial:
            partial.write_text(text)

    def _keep(self, record: tuple) -> None:
        with self._lock:
            if len(self._spans) < self.limit:
                self._spans.append(record)
            else:
                self.dropped += 1


def _trace_events(spans: list[Span], marks: list[Mark]) -> list[dict]:
    """Metadata first, then all events by start; of those that start together the longest, which holds the others."""
    origin = min([span.start for span in spans] + [mark.at for mark in marks], default=0.0)
    tids = {track: tid for tid, track in enumerate(dict.fromkeys(span.track for span in spans), start=1)}
    metadata = [{"ph": "M", "pid": PID, "name": "process_name", "args": {"name": "cachemoe"}}]
    for track, tid in tids.items():
        of_thread = {"ph": "M", "pid": PID, "tid": tid}
        metadata.append({**of_thread, "name": "thread_name", "args": {"name": track}})
        metadata.append({**of_thread, "name": "thread_sort_index", "args": {"sort_index": tid}})

    # Whole nanoseconds: what ends where the next begins still does so, and nothing is pushed out of what holds it.
    def nanoseconds(at: float) -> int:
        return round((at - origin) * 1e9)

    events = []
    for span in spans:
        start, end = nanoseconds(span.start), nanoseconds(span.end)
        if end < start:
            raise ValueError(f"the span {span.name!r} of {span.track!r} ends before it starts")
        event = {"ph": "X", "pid": PID, "tid": tids[span.track], "name": span.name}
        events.append({**event, "ts": start / 1e3, "dur": (end - start) / 1e3, "args": span.details})
    for mark in marks:
        event = {"ph": "i", "s": "p", "pid": PID, "tid": 1, "name": mark.name}
        events.append({**event, "ts": nanoseconds(mark.at) / 1e3})
    events.sort(key=lambda event: (event["ts"], -event.get("dur", float("inf"))))
    return metadata + events


def _cuda_base() -> tuple:
    """An event on the idle current device, and the ``perf_counter`` seconds at which it happened."""
    import torch  # here: without CUDA a timeline needs nothing of it

    torch.cuda.synchronize()
    readings = []
    for _ in range(10):  # the shortest says best when the event happened; the first ones warm the driver up
        event = torch.cuda.Event(enable_timing=True)
        before = perf_counter()
        event.record()
        event.synchronize()
        after = perf_counter()
        readings.append((after - before, event, (before + after) / 2))
    _, event, at = min(readings, key=lambda reading: reading[0])
    return event, at
