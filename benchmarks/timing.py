"""What one timed round is: a call on the CPU, many calls in one CUDA graph, or many calls queued one after another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from math import ceil
from time import perf_counter

import torch

from cachemoe.offload.capture import beside, captured

QUEUED = "queued"
REPLAY_S = 5e-3  # a replay lasts about this long, so that its own launch and the wait for its end hardly count


@dataclass(frozen=True)
class Round:
    """What the clock surrounds.

    Args:
        run: does the work and returns when it has ended.
        calls: calls in it; a call's time is the round's divided by them.
        timing: how, in words for the report.
    """

    run: Callable[[], object]
    calls: int
    timing: str


def plan_round(calls: Sequence[Callable[[], object]], device: torch.device, capturable: bool) -> Round:
    """Warm up, and make the round.

    Args:
        calls: the same work on other experts each, taken in turns.
        device: where the work runs.
        capturable: whether the work never waits for the GPU; what does is queued call by call, launches included.

    Raises:
        RuntimeError: on CUDA, if what is said to be capturable is not.
    """
    for call in calls[:2]:
        call()
    if device.type != "cuda":
        turns = cycle(calls)
        return Round(lambda: next(turns)(), 1, "call by call")
    if not capturable:

        def queue():
            for call in calls:
                call()
            torch.cuda.synchronize()

        return Round(queue, len(calls), QUEUED)
    repeats = ceil(REPLAY_S / (_seconds(calls[0]) * len(calls)))
    graph = _capture(calls, repeats * len(calls))

    def replay():
        graph.replay()
        torch.cuda.synchronize()

    return Round(replay, repeats * len(calls), "CUDA graph")


def _seconds(call: Callable[[], object]) -> float:
    """Of one call with its launch: at least what it takes within a graph."""
    torch.cuda.synchronize()
    start = perf_counter()
    call()
    torch.cuda.synchronize()
    return perf_counter() - start


def _capture(calls: Sequence[Callable[[], object]], count: int) -> torch.cuda.CUDAGraph:
    with beside():
        calls[0]()
    graph = torch.cuda.CUDAGraph()
    with captured(graph):
        for call in islice(cycle(calls), count):
            call()
    return graph
