"""One token's experts, all missing, from pinned host memory: fetched into slots, against the copy engine, and computed,
once they are fetched or while they are read through.

The CPU's link is its disk; ``cachemoe latency`` measures that.
"""

from functools import partial

import pytest
import torch

from cachemoe.benchmarks.geometries import GEOMETRIES
from cachemoe.benchmarks.micro_figures import PINNED, Subject, Work
from cachemoe.benchmarks.micro_turns import in_turns
from cachemoe.benchmarks.micro_workload import check, fill
from cachemoe.benchmarks.timing import plan_round
from cachemoe.kernels.experts import experts, experts_read_through
from cachemoe.kernels.fetch import fetch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="pages are fetched from pinned memory on a GPU")

CASES = [(name, kind) for name in GEOMETRIES for kind in ("bf16", "int4")]
CALLS = 4  # distinct sets of pages taken in turns: host memory is not cached on the device
IMPLEMENTATIONS = ("cachemoe", "copy engine, page by page", "gathered on the host, one copy")
WAYS = ("cachemoe", "cachemoe, fetched before")


def make_pages(name: str, kind: str):
    """Store ``[CALLS * K, page_bytes]`` uint8, pinned, and pool ``[K, page_bytes]`` on the GPU."""
    page_format, k = GEOMETRIES[name].page_format(kind), GEOMETRIES[name].top_k
    pages = torch.empty(CALLS * k, page_format.page_bytes, dtype=torch.uint8, pin_memory=True)
    fill(page_format.views(pages[:1]), page_format, torch.Generator().manual_seed(0))
    pages[1:] = pages[0]
    pages[:, 0] = torch.arange(CALLS * k)  # so that a page out of place is seen: the lower half of a weight, or two
    return pages, torch.empty(k, page_format.page_bytes, dtype=torch.uint8, device="cuda")


def turns(pages, pool):
    """``[CALLS, K]`` int64: the pages of each call."""
    return torch.randperm(len(pages), generator=torch.Generator().manual_seed(0)).view(-1, len(pool))


def fetch_calls(pages, pool):
    k, wanted = len(pool), turns(pages, pool)
    slots, count = torch.arange(k, device="cuda"), torch.tensor([k], device="cuda")
    return wanted, [partial(fetch, pages, pool, ids.cuda(), slots, count) for ids in wanted]


def copy_calls(pages, pool):
    """One copy a page, queued on the copy engine."""
    wanted = turns(pages, pool)

    def copy(ids):
        for slot, page in enumerate(ids):
            pool[slot].copy_(pages[page], non_blocking=True)

    return wanted, [partial(copy, ids.tolist()) for ids in wanted]


def gather_calls(pages, pool):
    """Pages gathered into one pinned buffer by the host, then one copy."""
    wanted = turns(pages, pool)
    buffer = torch.empty(pool.shape, dtype=torch.uint8, pin_memory=True)

    def gather(ids):
        torch.cuda.current_stream().synchronize()  # the copy before has left the buffer
        torch.index_select(pages, 0, ids, out=buffer)
        pool.copy_(buffer, non_blocking=True)

    return wanted, [partial(gather, ids) for ids in wanted]


MAKERS = dict(zip(IMPLEMENTATIONS, (fetch_calls, copy_calls, gather_calls), strict=True))


@pytest.mark.parametrize(("name", "kind", "repetition", "implementation"), in_turns(CASES, lambda *_: IMPLEMENTATIONS))
def test_fetch(measure, device, one_at_a_time, name, kind, repetition, implementation):
    pages, pool = one_at_a_time((name, kind), partial(make_pages, name, kind))
    wanted, calls = MAKERS[implementation](pages, pool)
    pool.zero_()
    calls[0]()
    assert torch.equal(pool.cpu(), pages[wanted[0]])
    timed = plan_round(calls, device, capturable=implementation != "gathered on the host, one copy")
    work = Work(pool.numel(), link=PINNED)
    measure(Subject("fetch", name, 1, kind, implementation), work, repetition, timed)


def through_calls(pages, pool, page_format, x, gates):
    """The experts read their pages from the store and write them to their slots."""
    wanted, slots = turns(pages, pool), torch.arange(len(pool), device="cuda")[None]
    run = partial(experts_read_through, x, slots, gates, pool, pages, page_format=page_format)
    return wanted, [partial(run, ids[None].cuda()) for ids in wanted]


def before_calls(pages, pool, page_format, x, gates):
    """Pages are fetched, then the experts read them from their slots."""
    slots, weights = torch.arange(len(pool), device="cuda")[None], page_format.views(pool)
    wanted, fetches = fetch_calls(pages, pool)

    def run(fetch_pages):
        fetch_pages()
        return experts(x, slots, gates, weights, page_format)

    return wanted, [partial(run, fetch_pages) for fetch_pages in fetches]


@pytest.mark.parametrize(("name", "kind", "repetition", "implementation"), in_turns(CASES, lambda *_: WAYS))
def test_read_through(measure, device, one_at_a_time, name, kind, repetition, implementation):
    page_format, k = GEOMETRIES[name].page_format(kind), GEOMETRIES[name].top_k
    pages, pool = one_at_a_time((name, kind), partial(make_pages, name, kind))
    x = torch.randn(1, page_format.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    gates = torch.full((1, k), 1 / k)
    make = through_calls if implementation == "cachemoe" else before_calls
    wanted, calls = make(pages, pool, page_format, x.cuda(), gates.cuda())
    pool.zero_()
    check(calls[0](), experts(x, wanted[:1], gates, page_format.views(pages), page_format))
    views = page_format.views(pages[wanted[0]])  # without what lies between the parts
    assert all(torch.equal(part.cpu(), views[place]) for place, part in page_format.views(pool).items())
    timed = plan_round(calls, device, capturable=True)
    work = Work(k * page_format.weight_bytes, link=PINNED)
    measure(Subject("read-through", name, 1, kind, implementation), work, repetition, timed)
