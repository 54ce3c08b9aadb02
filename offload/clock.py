"""Clocks: when work begins and ends, by the host's time or by events on a CUDA stream, which the host reads later."""

from time import perf_counter

import torch

from cachemoe.offload.timeline import Timeline


class HostClock:
    """For work that the host does itself."""

    deferred = False

    def now(self) -> float:
        """A moment, in seconds."""
        return perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """From one moment to the other."""
        return end - start

    def record(self, timeline: Timeline, track: str, name: str, start: float, end: float, **details) -> None:
        """As a span of the timeline."""
        timeline.span(track, name, start, end, **details)


class StreamClock:
    """For work queued on a GPU's current stream: a moment is when the stream gets there.

    Args:
        device: the GPU, which need not be the current one.

    Attributes:
        deferred: reading the time between two moments waits for the later one.
    """

    deferred = True

    def __init__(self, device: torch.device):
        self._device = device

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def record(self, timeline: Timeline, track: str, name: str, start, end, **details) -> None:
        timeline.cuda_span(track, name, start, end, **details)
