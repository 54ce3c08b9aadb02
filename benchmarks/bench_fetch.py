"""Fetching one token's experts, all missing, from pinned host memory into slots, against the copy engine.

The CPU's link is its disk; ``cachemoe latency`` measures that.
"""

from functools import partial

import pytest
import torch

from cachemoe.benchmarks.geometries import GEOMETRIES
from cachemoe.benchmarks.micro import PINNED, Subject, Work
from cachemoe.benchmarks.timing import plan_round

if not torch.cuda.is_available():
    pytest.skip("pages are fetched from pinned memory on a GPU only", allow_module_level=True)

from cachemoe.kernels.fetch import fetch

REPETITIONS = range(3)
KINDS = ("bf16", "int4")
CALLS = 4  # distinct sets of pages taken in turns: host memory is not cached on the device
IMPLEMENTATIONS = ("cachemoe", "copy engine, page by page", "gathered on the host, one copy")


def runs():
    """(geometry, kind, repetition, implementation): every implementation of a geometry once, then all again."""
    return [
        pytest.param(name, kind, repetition, how, id=f"{name}-{kind}-{repetition}-{how.replace(' ', '_')}")
        for name in GEOMETRIES
        for kind in KINDS
        for repetition in REPETITIONS
        for how in IMPLEMENTATIONS
    ]


def make_pages(name: str, kind: str):
    """Store ``[CALLS * K, page_bytes]`` uint8, pinned, and pool ``[K, page_bytes]`` on the GPU."""
    size, k = GEOMETRIES[name].page_format(kind).page_bytes, GEOMETRIES[name].top_k
    pages = torch.empty(CALLS * k, size, dtype=torch.uint8, pin_memory=True)
    pages.copy_(torch.randint(0, 256, (1, size), dtype=torch.uint8).expand_as(pages))
    pages[:, 0] = torch.arange(CALLS * k)  # so that a page out of place is seen
    return pages, torch.empty(k, size, dtype=torch.uint8, device="cuda")


def fetch_calls(pages, pool):
    k = len(pool)
    slots, count = torch.arange(k, device="cuda"), torch.tensor([k], device="cuda")
    wanted = torch.randperm(len(pages), generator=torch.Generator().manual_seed(0)).view(-1, k)
    return wanted, [partial(fetch, pages, pool, ids.cuda(), slots, count) for ids in wanted]


def copy_calls(pages, pool):
    """One copy a page, queued on the copy engine."""
    wanted = torch.randperm(len(pages), generator=torch.Generator().manual_seed(0)).view(-1, len(pool))

    def copy(ids):
        for slot, page in enumerate(ids):
            pool[slot].copy_(pages[page], non_blocking=True)

    return wanted, [partial(copy, ids.tolist()) for ids in wanted]


def gather_calls(pages, pool):
    """Pages gathered into one pinned buffer by the host, then one copy."""
    wanted = torch.randperm(len(pages), generator=torch.Generator().manual_seed(0)).view(-1, len(pool))
    buffer = torch.empty(pool.shape, dtype=torch.uint8, pin_memory=True)

    def gather(ids):
        torch.cuda.current_stream().synchronize()  # the copy before has left the buffer
        torch.index_select(pages, 0, ids, out=buffer)
        pool.copy_(buffer, non_blocking=True)

    return wanted, [partial(gather, ids) for ids in wanted]


MAKERS = dict(zip(IMPLEMENTATIONS, (fetch_calls, copy_calls, gather_calls), strict=True))


@pytest.mark.parametrize(("name", "kind", "repetition", "implementation"), runs())
def test_fetch(measure, device, one_at_a_time, name, kind, repetition, implementation):
    pages, pool = one_at_a_time((name, kind), partial(make_pages, name, kind))
    wanted, calls = MAKERS[implementation](pages, pool)
    pool.zero_()
    calls[0]()
    assert torch.equal(pool.cpu(), pages[wanted[0]])
    timed = plan_round(calls, device, capturable=implementation != "gathered on the host, one copy")
    work = Work(pool.numel(), link=PINNED)
    measure(Subject("fetch", name, 1, kind, implementation), work, repetition, timed)
