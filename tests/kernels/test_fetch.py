"""fetch: the pages that the list names, in the slots that it names, and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachemoe.kernels.fetch import fetch
from cachemoe.kernels.fetch_gpu import plan_fetch

pytestmark = pytest.mark.kernel


def device():
    """Asked in each test: a GPU may be imitated for some."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def through_the_kernel(*arguments):
    plan_fetch(*arguments).run()


both = pytest.mark.parametrize("run", [through_the_kernel, fetch])


def case(pages, slots, listed, count, words, seed=0):
    """Store, pool, and a miss list of which the first ``count`` entries count."""
    torch.manual_seed(seed)
    store = torch.randint(0, 256, (pages, 4 * words), dtype=torch.uint8)
    store = store.pin_memory() if device() == "cuda" else store
    pool = torch.randint(0, 256, (slots, 4 * words), dtype=torch.uint8).to(device())
    chosen, targets = torch.randint(0, pages, (listed,)), torch.randperm(slots)[:listed]
    # Beyond the count the list holds what must never be followed.
    chosen[count:], targets[count:] = 10**12, 10**12
    return store, pool, chosen.to(device()), targets.to(device()), torch.tensor([count]).to(device())


def expected(store, pool, pages, slots, count):
    pool = pool.clone()
    for i in range(int(count)):
        pool[int(slots[i])] = store[int(pages[i])].to(device())
    return pool


@both
@given(st.data())
@settings(max_examples=10)
def test_the_listed_pages_are_copied_and_nothing_else(run, data):
    slots = data.draw(st.integers(1, 6))
    listed = data.draw(st.integers(1, slots))
    count, words = data.draw(st.integers(0, listed)), 4 * data.draw(st.sampled_from([1, 255, 1024, 1025, 3000]))
    arguments = case(data.draw(st.integers(1, 5)), slots, listed, count, words, data.draw(st.integers(0, 99)))
    after = expected(*arguments)
    run(*arguments)
    assert torch.equal(arguments[1], after)


@both
def test_a_part_of_a_larger_pool_and_store(run):
    store, pool, pages, slots, count = case(8, 9, 2, 2, 1024)
    after = pool.clone()
    after[4:8] = expected(store[3:], pool[4:8], pages % 5, slots % 4, count)
    run(store[3:], pool[4:8], pages % 5, slots % 4, count)
    assert torch.equal(pool, after)


def test_slots_beyond_32_bits():
    stride, words = 2**30, 64  # in words of 4 bytes
    memory = torch.empty(3 * stride + words, dtype=torch.int32, device=device())  # hardly touched
    pool = memory.as_strided((4, words), (stride, 1)).view(torch.uint8)
    store = torch.randint(0, 256, (4, 4 * words), dtype=torch.uint8)
    store = store.pin_memory() if device() == "cuda" else store
    list_ = torch.arange(4, device=device())
    through_the_kernel(store, pool, list_.flip(0), list_, torch.tensor([4], device=device()))
    assert torch.equal(pool.cpu(), store.flip(0))


def test_torch_compile_takes_the_operator_whole():
    store, pool, pages, slots, count = case(4, 5, 3, 2, 1024)
    after = expected(store, pool, pages, slots, count)
    torch.compile(fetch, fullgraph=True, backend="aot_eager")(store, pool, pages, slots, count)
    assert torch.equal(pool, after)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"store": torch.zeros(2, 80, dtype=torch.uint8)}, "do not fit slots of 64"),
        (
            {"store": torch.zeros(2, 8, dtype=torch.uint8), "pool": torch.zeros(2, 8, dtype=torch.uint8)},
            "multiple of 16",
        ),
        ({"pool": torch.zeros(2, 64)}, "pool must be pages"),
        ({"pages": torch.zeros(1, dtype=torch.int32)}, "pages must be a contiguous list"),
        ({"slots": torch.zeros(1, 1, dtype=torch.int64)}, "slots must be"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    pages, one = torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    arguments = {"store": pages, "pool": pages.clone(), "pages": one, "slots": one, "count": one} | change
    with pytest.raises(ValueError, match=message):
        fetch(**arguments)


@pytest.mark.gpu
def test_a_gpu_does_not_read_pageable_memory():
    store, pool, *rest = case(4, 5, 3, 2, 1024)
    with pytest.raises(ValueError, match="pin_memory"):
        fetch(store.clone(), pool, *rest)


@pytest.mark.gpu
@pytest.mark.gpu_only("torch.compile")
def test_torch_compile_takes_a_pinned_store():
    store, pool, pages, slots, count = case(4, 5, 3, 2, 1024)
    assert store.is_pinned()
    after = expected(store, pool, pages, slots, count)
    torch.compile(fetch, fullgraph=True, backend="aot_eager")(store, pool, pages, slots, count)
    assert torch.equal(pool, after)


@pytest.mark.gpu
def test_a_captured_graph_follows_the_list():
    store, pool, pages, slots, count = case(4, 5, 4, 4, 4096)
    fetch(store, pool, pages, slots, count)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fetch(store, pool, pages, slots, count)
    for n in (0, 1, 3):
        pages.copy_(torch.randint(0, 4, (4,)))
        count.fill_(n)
        after = expected(store, pool, pages, slots, count)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(pool, after)
