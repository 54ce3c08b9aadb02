"""Pages from memory that the device can read, such as pinned host memory, into pool slots, as a miss list says.

The list lies on the device and so does its length: nothing is decided on the host, and the launch can be captured in a
CUDA graph. Grid: a fixed number of programs, few enough to leave the multiprocessors to others and enough to fill the
link; each takes the next block of the next page until the list ends.
"""

import torch
import triton
import triton.language as tl

from cachemoe.kernels.launch import Launch

PROGRAMS = 32
BLOCK_WORDS = 4096  # 16 KiB: 8 threads' warps of 16-byte accesses, four a thread
WARPS = 8


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
        source = store_ptr + tl.load(pages_ptr + miss) * store_stride
        slot = pool_ptr + tl.load(slots_ptr + miss) * pool_stride
        tl.store(slot + word, tl.load(source + word, word < words, 0, eviction_policy="evict_first"), word < words)


def plan_fetch(
    store: torch.Tensor, pool: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, count: torch.Tensor
) -> Launch:
    """The launch; arguments as ``fetch``."""
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
    return Launch(_fetch_kernel, (PROGRAMS,), arguments, {"BLOCK": BLOCK_WORDS}, WARPS)


@torch.library.custom_op("cachemoe::fetch", mutates_args=("pool",))
def _fetch(
    store: torch.Tensor, pool: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, count: torch.Tensor
) -> None:
    if pool.is_cuda:
        plan_fetch(store, pool, pages, slots, count).run()
    else:
        n = int(count)
        pool[slots[:n]] = store[pages[:n]]


@_fetch.register_fake
def _(store, pool, pages, slots, count):
    return None


def fetch(
    store: torch.Tensor, pool: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, count: torch.Tensor
) -> None:
    """Copy ``pool[slots[i]] = store[pages[i]]`` for i < count, in stream order on a GPU.

    Args:
        store: ``[N, page_bytes]`` uint8 in memory that the pool's device can read: its own, or pinned on the host.
        pool: ``[S, page_bytes]`` uint8; written.
        pages: ``[M]`` int64, the misses' pages, such as ``Misses.experts`` where ``store`` is one layer's.
        slots: ``[M]`` int64, distinct among those that count.
        count: ``[1]`` int64, on the device of the list.

    Raises:
        ValueError: if the pages of store and pool differ in size, or a GPU could not read the store.
    """
    if store.shape[1] != pool.shape[1] or store.shape[1] % 16:
        raise ValueError(f"pages of {store.shape[1]} bytes do not fit slots of {pool.shape[1]}, both multiples of 16")
    if pool.is_cuda and not (store.is_cuda or store.is_pinned()):
        raise ValueError("a GPU reads host memory only where it is pinned: use store.pin_memory()")
    _fetch(store, pool, pages, slots, count)
