"""The link: pages arrive whole, failures reach the caller, and a paced link keeps its rate."""

import threading
import time

import numpy as np
import pytest

from cachemoe.kernels.formats import PageFormat
from cachemoe.offload.link import Link, Pacing
from cachemoe.offload.store import aligned_buffer

SIZE = PageFormat("bf16", 32, 32).page_bytes


class MemoryStore:
    """Stands in for a store: page (layer, expert) is filled with 16 * layer + expert; some reads fail."""

    page_bytes = SIZE

    def __init__(self, failing=()):
        self.failing = failing

    def offset(self, layer, expert):
        return 16 * layer + expert

    def read_into(self, buffer, offset):
        if offset in self.failing:
            raise OSError(f"page {offset}")
        np.frombuffer(buffer, dtype=np.uint8)[:] = offset


def request(layer, expert):
    buffer = aligned_buffer(SIZE)
    return (layer, expert, memoryview(buffer), (layer, expert, buffer))


def test_each_page_arrives_in_its_buffer():
    with Link(MemoryStore()) as link, link.fetch(request(i % 3, i % 5) for i in range(40)) as arrivals:
        filled = [(buffer == 16 * layer + expert).all() for layer, expert, buffer in arrivals]
    assert len(filled) == 40
    assert all(filled)


def test_a_failed_read_raises_where_the_pages_are_awaited():
    with Link(MemoryStore(failing={7})) as link:
        with pytest.raises(OSError, match="page 7"), link.fetch([request(0, e) for e in range(9)]) as arrivals:
            list(arrivals)
        with link.fetch([request(0, 3)]) as arrivals:
            assert len(list(arrivals)) == 1


def test_leaving_early_waits_for_the_readers():
    class SlowStore(MemoryStore):
        def read_into(self, buffer, offset):
            time.sleep(0.01)
            super().read_into(buffer, offset)

    requests = [request(0, e + 1) for e in range(16)]
    with Link(SlowStore()) as link, link.fetch(requests):
        pass
    left = [buffer.copy() for *_, (_, _, buffer) in requests]
    time.sleep(0.1)  # time enough for any read that was still to come
    assert all((buffer == before).all() for (*_, (_, _, buffer)), before in zip(requests, left, strict=True))


def test_closing_joins_the_readers_and_may_be_repeated():
    before = threading.active_count()
    link = Link(MemoryStore())
    assert threading.active_count() > before
    link.close()
    link.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(("rate", "latency"), [(100 * SIZE, 0.0), (1e12, 0.01), (200 * SIZE, 0.005)])
def test_a_paced_link_is_never_faster_than_told(rate, latency):
    pages = 20
    with Link(MemoryStore(), Pacing(rate, latency)) as link:
        start = time.monotonic()
        with link.fetch([request(0, 1) for _ in range(pages)]) as arrivals:
            landed = [time.monotonic() - start for _ in arrivals]
    least = [(i + 1) * (latency + SIZE / rate) for i in range(pages)]
    assert all(t >= expected - 1e-3 for t, expected in zip(sorted(landed), least, strict=True))
