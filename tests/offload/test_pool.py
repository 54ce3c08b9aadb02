"""The pool's memory."""

import pytest

from cachemoe.kernels.formats import PageFormat
from cachemoe.offload import pool
from cachemoe.offload.errors import InputError

FORMAT = PageFormat("bf16", 32, 32)


def test_slots_are_aligned_and_apart():
    slots = pool.ExpertPool([2, 3], FORMAT)
    starts = [slot.data_ptr() for layer in (0, 1) for slot in slots.weights(layer)["gate_up"]]
    assert starts[0] % 4096 == 0
    assert [start - starts[0] for start in starts] == [i * FORMAT.page_bytes for i in range(5)]


def test_what_is_read_into_a_slot_is_what_it_computes_with():
    slots = pool.ExpertPool([1, 2], FORMAT)
    slots.buffer(1, 1)[:2] = b"\x80\x3f"  # 1.0 in bfloat16
    assert slots.weights(1)["gate_up"][1, 0, 0] == 1.0


def test_a_pool_that_memory_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setattr(pool, "available_memory", lambda: 10 * FORMAT.page_bytes - 1)
    with pytest.raises(InputError, match="10 slots needs"):
        pool.ExpertPool([5, 5], FORMAT)
    assert pool.ExpertPool([5, 4], FORMAT)


def test_an_absurd_pool_is_refused():
    with pytest.raises(InputError, match="choose a smaller capacity"):
        pool.ExpertPool([10**12], FORMAT)
