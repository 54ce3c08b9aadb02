"""Pages from memory that the device can read, such as pinned host memory, into pool slots, as a miss list says.

The list lies on the device and so does its length: nothing is decided on the host, and the launch can be captured in a
CUDA graph.
"""

import torch


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
        ValueError: if shapes or dtypes do not fit together, or a GPU could not read the store.
    """
    for name, tensor in (("store", store), ("pool", pool)):
        if tensor.dtype != torch.uint8 or tensor.dim() != 2 or tensor.shape[1] % 16 or tensor.stride(1) != 1:
            raise ValueError(
                f"{name} must be pages of a multiple of 16 uint8, not {tensor.dtype} {tuple(tensor.shape)}"
            )
    if store.shape[1] != pool.shape[1]:
        raise ValueError(f"pages of {store.shape[1]} bytes do not fit slots of {pool.shape[1]}")
    for name, tensor in (("pages", pages), ("slots", slots), ("count", count)):
        if tensor.dtype != torch.int64 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be a contiguous list of int64, not {tensor.dtype} {tuple(tensor.shape)}")
    run = torch.ops.cachemoe.fetch if torch.compiler.is_compiling() else _run
    run(store, pool, pages, slots, count)


def check_gpu_can_read(store: torch.Tensor) -> None:
    """Whether a kernel may be given this memory. Not for code that ``torch.compile`` traces: it asks the real tensor.

    Raises:
        ValueError: if it is the host's and not pinned.
    """
    if not (store.is_cuda or store.is_pinned()):
        raise ValueError("a GPU reads host memory only where it is pinned: use store.pin_memory()")


def _run(
    store: torch.Tensor, pool: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, count: torch.Tensor
) -> None:
    if not pool.is_cuda:
        for page, slot in zip(pages[: int(count)].tolist(), slots.tolist(), strict=False):
            pool[slot].copy_(store[page])
        return
    check_gpu_can_read(store)
    from cachemoe.kernels.fetch_gpu import plan_fetch  # here, since not every machine has triton

    plan_fetch(store, pool, pages, slots, count).run()


torch.library.custom_op("cachemoe::fetch", _run, mutates_args=("pool",)).register_fake(lambda *_: None)
