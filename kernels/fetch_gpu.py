"""``fetch`` in Triton: a fixed number of programs, each of which takes the next block of the next page of the list.

Grid: few enough programs to leave the multiprocessors to others, enough to fill the link. Pages are copied in the order
of the list, all programs on neighbouring blocks.
"""

import torch
import triton
import triton.language as tl

from cachemoe.kernels.launch import Launch

PROGRAMS = 32
WARPS = 8
BLOCK_WORDS = 4096  # 16 KiB: four accesses of 16 bytes a thread


@triton.jit
def _fetch_kernel(
    store_ptr,  # [N, words] int32
    pool_ptr,  # [S, words] int32  output
    pages_ptr,  # [M] int64
    slots_ptr,  # [M] int64
    count_ptr,  # [1] int64, entries of the list that count
    words,  # 4-byte words of a page
    store_stride,  # words from a page to the next
    pool_stride,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(words, BLOCK)
    total = tl.load(count_ptr) * blocks
    for i in range(tl.program_id(0).to(tl.int64), total, tl.num_programs(0)):
        miss = i // blocks
        word = (i % blocks) * BLOCK + tl.arange(0, BLOCK)
        source = store_ptr + tl.load(pages_ptr + miss).to(tl.int64) * store_stride
        slot = pool_ptr + tl.load(slots_ptr + miss).to(tl.int64) * pool_stride
        tl.store(slot + word, tl.load(source + word, word < words, 0, eviction_policy="evict_first"), word < words)


def plan_fetch(
    store: torch.Tensor, pool: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, count: torch.Tensor
) -> Launch:
    """The launch; arguments as ``cachemoe.kernels.fetch.fetch``."""
    store, pool = store.view(torch.int32), pool.view(torch.int32)
    arguments = {
        "store_ptr": store,
        "pool_ptr": pool,
        "pages_ptr": pages,
        "slots_ptr": slots,
        "count_ptr": count,
        "words": store.shape[1],
        "store_stride": store.stride(0),
        "pool_stride": pool.stride(0),
    }
    return Launch(_fetch_kernel, (PROGRAMS,), arguments, {"BLOCK": BLOCK_WORDS}, WARPS, streams_pages=True)
