"""The timeline: what is written is what was recorded, on one axis, whoever recorded it and by whichever clock."""

import json
import subprocess
import sys
import threading
from itertools import accumulate, pairwise
from time import perf_counter, sleep

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachemoe.offload import timeline as module
from cachemoe.offload.timeline import Mark, Span, Timeline


def written(timeline, tmp_path):
    timeline.write(tmp_path / "trace.json")
    return json.loads((tmp_path / "trace.json").read_text())


def test_a_trace_event_by_event(tmp_path):
    timeline = Timeline()
    timeline.mark("token 0", 10.0)
    timeline.span("read 0", "page", 10.002, 10.005, layer=1, expert=7, bytes=4096, kind="demand")
    timeline.span("compute", "experts", 10.001, 10.0025, layer=1)
    assert written(timeline, tmp_path) == {
        "traceEvents": [
            {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "cachemoe"}},
            {"ph": "M", "pid": 1, "tid": 1, "name": "thread_name", "args": {"name": "read 0"}},
            {"ph": "M", "pid": 1, "tid": 1, "name": "thread_sort_index", "args": {"sort_index": 1}},
            {"ph": "M", "pid": 1, "tid": 2, "name": "thread_name", "args": {"name": "compute"}},
            {"ph": "M", "pid": 1, "tid": 2, "name": "thread_sort_index", "args": {"sort_index": 2}},
            {"ph": "i", "s": "p", "pid": 1, "tid": 1, "name": "token 0", "ts": 0},
            {"ph": "X", "pid": 1, "tid": 2, "name": "experts", "ts": 1000, "dur": 1500, "args": {"layer": 1}},
            {
                **{"ph": "X", "pid": 1, "tid": 1, "name": "page", "ts": 2000, "dur": 3000},
                "args": {"layer": 1, "expert": 7, "bytes": 4096, "kind": "demand"},
            },
        ],
        "displayTimeUnit": "ms",
        "otherData": {"limit": 200_000, "dropped": 0},
    }


def test_times_count_from_the_earliest(tmp_path):
    timeline = Timeline()
    timeline.span("compute", "later", 123456.75, 123457.0)
    timeline.span("compute", "earlier", 123456.5, 123456.75)
    events = [(e["name"], e["ts"], e["dur"]) for e in written(timeline, tmp_path)["traceEvents"] if e["ph"] == "X"]
    assert events == [("earlier", 0, 250_000), ("later", 250_000, 250_000)]


def test_an_empty_timeline_is_a_trace(tmp_path):
    assert [e["name"] for e in written(Timeline(), tmp_path)["traceEvents"]] == ["process_name"]


def test_what_holds_others_comes_before_them(tmp_path):
    timeline = Timeline()
    for name, end in (("innermost", 1.1), ("inner", 1.2), ("outer", 1.4)):  # a span is recorded when it ends
        timeline.span("compute", name, 1.0, end)
    names = [e["name"] for e in written(timeline, tmp_path)["traceEvents"] if e["ph"] == "X"]
    assert names == ["outer", "inner", "innermost"]


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=20, unique=True))
def test_spans_that_meet_neither_overlap_nor_leave_what_holds_them(tmp_path_factory, times):
    times.sort()
    timeline = Timeline()
    timeline.span("compute", "all", times[0], times[-1])
    for start, end in pairwise(times):
        timeline.span("compute", "part", start, end)
    everything, *parts = [
        (round(1e3 * e["ts"]), round(1e3 * (e["ts"] + e["dur"])))
        for e in written(timeline, tmp_path_factory.mktemp("trace"))["traceEvents"]
        if e["ph"] == "X"
    ]
    parts.sort()
    assert everything == (parts[0][0], parts[-1][1])
    assert all(left[1] == right[0] for left, right in pairwise(parts))


def test_spans_and_marks_can_be_read_back():
    timeline = Timeline()
    timeline.span("route", "route", 2.0, 3.0, layer=0)
    timeline.span("copy", "page", 1.0, 2.5)
    timeline.mark("token 3", 2.0)
    assert timeline.spans() == [Span("route", "route", 2.0, 3.0, {"layer": 0}), Span("copy", "page", 1.0, 2.5, {})]
    assert timeline.marks() == [Mark("token 3", 2.0)]


def from_threads(timeline, threads, each):
    """Record ``each`` spans and as many marks from each of the threads, all at once."""
    together = threading.Barrier(threads)

    def record(thread):
        together.wait()
        for i in range(each):
            timeline.span(f"read {thread}", "page", i, i + 1, expert=i)
            timeline.mark("token", i)

    workers = [threading.Thread(target=record, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


@pytest.fixture
def many_switches():
    """Threads take turns far more often than they would."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_threads_lose_nothing(many_switches):
    timeline = Timeline()
    from_threads(timeline, threads=8, each=500)
    assert timeline.dropped == 0
    assert len(timeline.marks()) == 8 * 500
    for thread in range(8):
        mine = [span.details["expert"] for span in timeline.spans() if span.track == f"read {thread}"]
        assert mine == list(range(500))


def test_what_is_beyond_the_limit_is_counted(many_switches, tmp_path):
    timeline = Timeline(limit=1000)
    from_threads(timeline, threads=8, each=500)
    assert len(timeline.spans()) == 1000
    assert len(timeline.marks()) == 8 * 500  # all of them
    assert written(timeline, tmp_path)["otherData"] == {"limit": 1000, "dropped": 3000}


@pytest.mark.parametrize(
    ("times", "details", "error"),
    [
        ((2.0, 1.0), {}, ValueError),
        ((1.0, 2.0), {"share": float("nan")}, ValueError),
        ((1.0, 2.0), {"expert": np.int64(3)}, TypeError),
    ],
)
def test_what_no_viewer_could_read_is_refused_and_nothing_written(tmp_path, times, details, error):
    timeline = Timeline()
    timeline.span("read 0", "page", *times, **details)
    with pytest.raises(error):
        timeline.write(tmp_path / "trace.json")
    assert list(tmp_path.iterdir()) == []


class FakeEvent:
    """Stands in for a CUDA event that happened ``at`` seconds of the device's clock."""

    def __init__(self, at):
        self.at = at
        self.awaited = False

    def synchronize(self):
        self.awaited = True

    def elapsed_time(self, later):
        assert later.awaited
        return float(np.float32(1e3 * (later.at - self.at)))


def test_cuda_spans_share_the_axis_of_the_others(monkeypatch):
    base = FakeEvent(0.5)
    base.awaited = True
    monkeypatch.setattr(module, "_cuda_base", lambda: (base, 100.0))
    timeline = Timeline(cuda=True)
    timeline.cuda_span("copy", "page", FakeEvent(2.5), FakeEvent(3.0), expert=4)
    timeline.span("route", "route", 101.0, 101.5)
    timeline.cuda_span("compute", "experts", FakeEvent(1.5), FakeEvent(2.0))
    assert timeline.spans() == [
        Span("copy", "page", 102.0, 102.5, {"expert": 4}),
        Span("route", "route", 101.0, 101.5, {}),
        Span("compute", "experts", 101.0, 101.5, {}),
    ]


def test_cuda_spans_stay_exact_after_minutes(monkeypatch):
    monkeypatch.setattr(module, "_cuda_base", lambda: (FakeEvent(0.0), 0.0))
    timeline = Timeline(cuda=True)
    starts = list(accumulate(np.random.default_rng(0).uniform(0.0, 0.2, 10_000).tolist()))
    for start in starts:
        timeline.cuda_span("copy", "page", FakeEvent(start), FakeEvent(start + 1e-4))
    off = [abs(span.start - start) for span, start in zip(timeline.spans(), starts, strict=True)]
    assert max(off) < 2e-6  # 60e-6 if each were measured from the base, 1000 s before the last
    assert all(span.end - span.start == pytest.approx(1e-4, rel=1e-3) for span in timeline.spans())


def test_cuda_spans_count_towards_the_limit(monkeypatch):
    monkeypatch.setattr(module, "_cuda_base", lambda: (FakeEvent(0.0), 0.0))
    timeline = Timeline(cuda=True, limit=1)
    for _ in range(3):
        timeline.cuda_span("copy", "page", FakeEvent(1.0), FakeEvent(2.0))
    assert (len(timeline.spans()), timeline.dropped) == (1, 2)


def test_a_timeline_without_cuda_refuses_its_events():
    with pytest.raises(RuntimeError, match="cuda=True"):
        Timeline().cuda_span("copy", "page", FakeEvent(1.0), FakeEvent(2.0))


def test_without_cuda_torch_is_not_imported():
    script = (
        "import sys; from cachemoe.offload.timeline import Timeline; "
        "t = Timeline(); t.span('a', 'b', 0.0, 1.0); t.spans(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.mark.gpu
@pytest.mark.gpu_only("its clock, which is another than the host's")
def test_events_of_a_gpu_fall_between_the_host_s_readings_around_them():
    timeline = Timeline(cuda=True)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    x = torch.rand(2048, 2048, device="cuda")
    torch.mm(x, x)  # cuBLAS loads before anything is timed
    around = []
    for i in range(20):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        before = perf_counter()
        with torch.cuda.stream(streams[i % 2]):
            events[0].record()
            for _ in range(5):
                torch.mm(x, x)
            events[1].record()
        timeline.cuda_span("compute", "matmuls", *events, i=i)
        torch.cuda.synchronize()
        around.append((before, perf_counter()))
        sleep(0.005)
    for span, (before, after) in zip(timeline.spans(), around, strict=True):
        assert before - 1e-4 < span.start < span.end < after + 1e-4


@pytest.mark.gpu
@pytest.mark.gpu_only("a kernel that lasts")
def test_events_of_a_gpu_that_have_not_happened_yet_are_awaited(tmp_path):
    timeline = Timeline(cuda=True)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    torch.cuda._sleep(50_000_000)  # cycles: some 30 ms
    events[1].record()
    timeline.cuda_span("compute", "sleep", *events)
    (event,) = [e for e in written(timeline, tmp_path)["traceEvents"] if e["ph"] == "X"]
    assert event["dur"] > 5_000


@pytest.mark.gpu
def test_an_event_of_a_gpu_that_was_never_recorded_is_refused():
    timeline = Timeline(cuda=True)
    timeline.cuda_span("copy", "page", *(torch.cuda.Event(enable_timing=True) for _ in range(2)))
    with pytest.raises((RuntimeError, ValueError)):
        timeline.spans()
