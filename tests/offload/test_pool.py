"""The pool's memory."""

import mmap

import pytest

from cachemoe.kernels.formats import PageFormat
from cachemoe.offload import pool
from cachemoe.offload.errors import InputError

FORMAT = PageFormat("bf16", 32, 32)


def test_frames_are_aligned_and_apart():
    frames = pool.ExpertPool(5, FORMAT)
    starts = [matrix.data_ptr() for matrix in frames.weights["gate_up"]]
    assert starts[0] % 4096 == 0
    assert [start - starts[0] for start in starts] == [i * FORMAT.page_bytes for i in range(5)]


def test_what_is_read_into_a_frame_is_what_it_computes_with():
    frames = pool.ExpertPool(3, FORMAT)
    frames.buffer(2)[:2] = b"\x80\x3f"  # 1.0 in bfloat16
    assert frames.weights["gate_up"][2, 0, 0] == 1.0


def test_frames_that_stay_keep_their_pages():
    frames = pool.ExpertPool(3, FORMAT)
    for frame in range(3):
        frames.pages[frame] = frame + 1
    for count in (200, 2, 1, 3):
        frames.resize(count)
        assert frames.pages.shape == (count, FORMAT.page_bytes)
        assert (frames.pages[0] == 1).all()
        frames.buffer(count - 1)[-1] = 7
        assert frames.pages[-1, -1] == 7
        frames.pages[:] = frames.pages[:1].clone()
        frames.pages[0] = 1


def test_memory_that_somebody_looks_at_is_copied():
    frames = pool.ExpertPool(2, FORMAT)
    frames.pages[1] = 3
    held = frames.pages
    frames.resize(4)
    assert (frames.pages[1] == 3).all()
    frames.pages[1] = 4
    assert (held[1] == 3).all()


def test_a_pool_that_memory_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setattr(pool, "available_memory", lambda: 10 * FORMAT.page_bytes - 1)
    with pytest.raises(InputError, match="10 pages needs"):
        pool.ExpertPool(10, FORMAT)
    frames = pool.ExpertPool(9, FORMAT)
    frames.pages[8] = 5
    with pytest.raises(InputError, match="20 pages needs"):
        frames.resize(20)
    assert (frames.pages[8] == 5).all()


def test_an_absurd_pool_is_refused():
    with pytest.raises(InputError, match="choose a smaller capacity"):
        pool.ExpertPool(10**12, FORMAT)


@pytest.mark.parametrize("somebody_looks", [False, True])
def test_a_resize_that_the_system_refuses_leaves_the_pool_as_it_was(monkeypatch, somebody_looks):
    class Refusing(mmap.mmap):
        def resize(self, size):
            if somebody_looks:
                return super().resize(size)
            raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pool.mmap, "mmap", Refusing)
    frames = pool.ExpertPool(3, FORMAT)
    frames.pages[2] = 5
    held = frames.pages if somebody_looks else None

    def refuses(*_):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pool.mmap, "mmap", refuses)
    with pytest.raises(InputError, match=r"the system refuses .* for a pool of 40 pages"):
        frames.resize(40)
    assert frames.pages.shape == (3, FORMAT.page_bytes)
    assert (frames.pages[2] == 5).all()
    frames.buffer(2)[0] = 7
    assert frames.weights["gate_up"].shape[0] == 3
    assert held is None or held[2, 0] == 7
