"""The link: pages arrive whole, demands first, failures reach the caller, and a paced link keeps its rate."""

import threading
import time

import pytest
import torch

from cachemoe.offload.carriers import chunk_size
from cachemoe.offload.link import DEMAND, PREFETCH, Link, Pacing

PAGE, CHUNK = 16384, 4096


class Memory:
    """A carrier from memory to memory: page (layer, expert) is filled with 16 * layer + expert.

    Args:
        failing: pages that cannot be read, as 16 * layer + expert.
        gate: what every chunk waits for.
        seconds: that a chunk takes.
        chunk: bytes of one.
    """

    track, page_bytes = "read", PAGE

    def __init__(self, frames=8, threads=4, failing=(), gate=None, seconds=0.0, chunk=PAGE):
        self.frames = torch.zeros(frames, PAGE, dtype=torch.uint8)
        self.threads, self.failing, self.gate, self.seconds = threads, failing, gate, seconds
        self.chunk_bytes, self.carried, self.drained = chunk, [], 0

    def prepare(self, transfer):
        pass

    def carry(self, transfer, start, stop):
        page = 16 * transfer.layer + transfer.expert
        self.carried.append(page)
        if self.gate is not None:
            assert self.gate.wait(10)
        time.sleep(self.seconds)
        if page in self.failing:
            raise OSError(f"page {page}")
        self.frames[transfer.frame, start:stop] = page

    def check(self, transfer):
        pass

    def drain(self):
        self.drained += 1

    def busy_s(self):
        pass

    def record(self, timeline, name, transfer, began, ended, **details):
        raise ZeroDivisionError(name)

    def use(self, transfer):
        pass


def carried_until(carrier, count):
    end = time.monotonic() + 10
    while len(carrier.carried) < count:
        assert time.monotonic() < end
        time.sleep(1e-4)


def test_each_page_arrives_in_its_frame():
    carrier = Memory(frames=40, chunk=CHUNK)
    with Link([carrier]) as link:
        asked = [link.request(i % 3, i % 5, i) for i in range(40)]
        landed = list(link.landed(asked))
    assert sorted(map(id, landed)) == sorted(map(id, asked))
    for i, page in enumerate(carrier.frames):
        assert (page == 16 * (i % 3) + i % 5).all()


def test_a_failed_read_raises_where_the_page_is_awaited():
    with Link([Memory(frames=9, failing={7}, chunk=CHUNK)]) as link:
        asked = [link.request(0, e, e) for e in range(9)]
        with pytest.raises(OSError, match="page 7"):
            list(link.landed(asked))
        link.abandon()
        assert all(transfer.landed for transfer in asked)
        assert len(list(link.landed([link.request(0, 3, 3)]))) == 1


def test_whatever_fails_in_a_thread_reaches_the_caller_and_the_thread_lives_on():
    with Link([Memory(threads=1)], timeline=object()) as link:
        for e in range(3):
            with pytest.raises(ZeroDivisionError, match=f"layer 0 expert {e}"):
                list(link.landed([link.request(0, e, e)]))


def test_an_interrupt_while_changing_the_queues_breaks_the_link():
    carrier = Memory(threads=1, gate=threading.Event())
    with Link([carrier]) as link:
        ahead = [link.request(0, e, e, cause=PREFETCH) for e in (1, 2)]
        carried_until(carrier, 1)

        class Interrupts:
            def remove(self, transfer):
                raise KeyboardInterrupt

            def __contains__(self, transfer):
                return True

        queues, link._queues = link._queues, {True: link._queues[True], False: Interrupts()}
        with pytest.raises(KeyboardInterrupt):
            link.promote(ahead[1])
        link._queues = queues
        with pytest.raises(RuntimeError, match="broken by an interrupt"):
            link.request(0, 3, 3)
        carrier.gate.set()


def test_a_demand_overtakes_prefetches_and_waits_for_one_chunk_at_most():
    carrier = Memory(threads=1, gate=threading.Event(), chunk=CHUNK)
    with Link([carrier]) as link:
        ahead = [link.request(0, e, e, cause=PREFETCH) for e in (1, 2)]
        carried_until(carrier, 1)
        demand = link.request(0, 5, 5)
        carrier.gate.set()
        assert [transfer.expert for transfer in link.landed([demand, *ahead])] == [5, 1, 2]
    assert carrier.carried == [1, *[5] * 4, *[1] * 3, *[2] * 4]


def test_one_thread_is_kept_free_of_prefetches():
    carrier = Memory(threads=3, gate=threading.Event(), chunk=CHUNK)
    with Link([carrier]) as link:
        link.request(0, 1, 1, cause=PREFETCH)
        carried_until(carrier, 2)
        time.sleep(0.02)
        assert carrier.carried == [1, 1]
        link.request(0, 2, 2)
        carried_until(carrier, 3)
        assert carrier.carried[2] == 2
        carrier.gate.set()


def test_a_promoted_prefetch_overtakes_the_others():
    carrier = Memory(threads=1, gate=threading.Event())
    with Link([carrier]) as link:
        ahead = [link.request(0, e, e, cause=PREFETCH) for e in (1, 2, 3)]
        carried_until(carrier, 1)
        link.promote(ahead[2])
        carrier.gate.set()
        list(link.landed(ahead))
    assert carrier.carried == [1, 3, 2]


def test_what_has_not_begun_can_be_cancelled_and_what_has_is_moved_whole():
    carrier = Memory(threads=1, gate=threading.Event(), chunk=CHUNK)
    with Link([carrier]) as link:
        ahead = [link.request(0, e, e, cause=PREFETCH) for e in (1, 2)]
        carried_until(carrier, 1)
        assert [link.cancel(transfer) for transfer in ahead] == [False, True]
        assert ahead[1].landed
        carrier.gate.set()
        assert [transfer.expert for transfer in link.landed(ahead[:1])] == [1]
        assert not link.cancel(ahead[0])
    assert (carrier.frames[1] == 1).all()
    assert not carrier.frames[2].any()


def test_after_abandoning_no_frame_is_written():
    carrier = Memory(frames=16, seconds=0.01)
    with Link([carrier]) as link:
        for e in range(16):
            link.request(0, e, e, cause=DEMAND if e % 2 else PREFETCH)
        link.abandon()
        left = carrier.frames.clone()
        time.sleep(0.1)  # time enough for any that was still to come
        assert torch.equal(carrier.frames, left)
        assert link.queued_bytes == 0


def test_closing_joins_the_threads_and_may_be_repeated():
    before = threading.active_count()
    carrier = Memory(gate=threading.Event())
    link = Link([carrier])
    assert threading.active_count() > before
    asked = [link.request(0, e, e) for e in range(8)]
    carried_until(carrier, 4)
    threading.Timer(0.05, carrier.gate.set).start()
    link.close()
    link.close()
    with pytest.raises(RuntimeError, match="closed"):
        link.request(0, 0, 0)
    with pytest.raises(RuntimeError, match="closed before"):
        list(link.landed(asked))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read ")]


def test_bandwidth_is_measured_while_busy():
    with Link([Memory(threads=1, seconds=0.01)]) as link:
        assert link.bytes_per_second is None
        list(link.landed([link.request(0, e, e) for e in range(5)]))
        time.sleep(0.1)
        list(link.landed([link.request(0, 5, 5)]))
        assert 0.06 <= link.busy_s < 0.15
        assert PAGE / 0.025 < link.bytes_per_second <= PAGE / 0.01


def test_closing_waits_for_what_is_only_queued():
    """A copy to a GPU has landed when it is queued: it would write into memory that is freed."""
    carrier = Memory()
    link = Link([carrier])
    list(link.landed([link.request(0, 1, 0)]))
    link.close()
    assert carrier.drained == 1
    link.close()
    assert carrier.drained == 1


@pytest.mark.parametrize(("rate", "latency"), [(100 * PAGE, 0.0), (1e12, 0.01), (200 * PAGE, 0.005)])
def test_a_paced_link_is_never_faster_than_told(rate, latency):
    pages = 20
    with Link([Memory(frames=pages, chunk=CHUNK)], Pacing(rate, latency)) as link:
        start = time.perf_counter()
        landed = []
        for _ in link.landed([link.request(0, 1, frame) for frame in range(pages)]):
            landed.append(time.perf_counter() - start)
    least = [(i + 1) * (latency + PAGE / rate) for i in range(pages)]
    assert all(t >= expected - 1e-3 for t, expected in zip(landed, least, strict=True))


def test_a_paced_link_makes_up_for_a_slow_moment():
    """What is paced is the whole backlog: a chunk that is late does not put off the end of the last."""

    class Hiccup(Memory):
        def carry(self, transfer, start, stop):
            if transfer.expert == 3:
                time.sleep(0.05)
            super().carry(transfer, start, stop)

    schedule = []
    with Link([Hiccup(frames=20, threads=1)], Pacing(100 * PAGE)) as link:
        asked = [link.request(0, e, e) for e in range(15)]
        for transfer in link.landed(asked):
            schedule.append((transfer.expert, time.perf_counter() - asked[0].asked))
    late = dict(schedule)[3] - 0.04  # by so much was page 3 late; the pages after it only as long as it takes
    assert late > 0
    assert dict(schedule)[14] >= 0.15 - 1e-3


@pytest.mark.parametrize(
    ("page", "threads", "expected"),
    [
        (4 << 20, 4, 1 << 20),
        (4866048, 4, 1216512),  # Qwen1.5-MoE's int4: all four readers end together
        (4096, 4, 1 << 18),
        (17 << 20, 4, 1114112),  # 16 pieces
        (17 << 20, 1, 1 << 20),
    ],
)
def test_a_page_is_cut_so_that_all_threads_end_together(page, threads, expected):
    assert chunk_size(page, threads) == expected
