"""The experts of a layer over pool slots: y[t] = sum over k of gates[t, k] * down(act(gate(x[t])) * up(x[t])).

Weights are read where they lie: ``slots`` is the page table's answer. Few pairs of token and expert go through
``experts_decode``, many through ``experts_prefill``, CPU tensors through ``experts_cpu``. Products accumulate in
float32. A pair's result is reduced before the sum over k, in an order that does not depend on which pairs are computed
together: hits first and misses later gives the bits that all at once gives.
"""

from collections.abc import Sequence

import torch

from cachemoe.kernels import experts_cpu
from cachemoe.kernels.experts_tiles import DECODE_PAIRS
from cachemoe.kernels.fetch import check_gpu_can_read, fetch
from cachemoe.kernels.formats import PageFormat


def experts(
    x: torch.Tensor,
    slots: torch.Tensor,
    gates: torch.Tensor,
    weights: dict[str, torch.Tensor],
    page_format: PageFormat,
    out: torch.Tensor | None = None,
    pending: torch.Tensor | None = None,
    partial: torch.Tensor | None = None,
    finish: bool = True,
    among: int | None = None,
    most: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Run each token's experts and sum their results weighted by the gates.

    Args:
        x: ``[T, H]`` contiguous, float32, float16 or bfloat16.
        slots: ``[T, K]`` int64, the slot of each expert; -1: a dropped one, which has no part in the sum.
        gates: ``[T, K]`` float32.
        weights: ``page_format.views`` of the pool's slots ``[S, page_bytes]``, or a model's own tensors by those names.
        page_format: layout of the pages.
        out: ``[T, H]`` in x's dtype, written; made if None.
        pending: ``[T, K]`` bool, pairs to compute now; None: all. All pairs of a slot are pending together.
        partial: ``[T, K, H]`` float32: results of pairs, needed with ``pending``. Where not pending they are read to
            finish. Where pending they are written if ``finish`` is False, and may be otherwise.
        finish: whether to sum and write ``out``; False leaves it as it is, for a call that computes the rest.
        among: how many distinct slots there can be in ``slots``, as a layer's E; None: as many as the pool has. Of many
            tokens on a GPU it chooses the tiles, and so the bits: it is to be the same for all calls of a layer.
        most: of the pairs computed now how many there are at most, and how many distinct slots they have; None: all of
            ``slots``, and ``among``. A GPU computes no more than these.

    Returns:
        ``out``.

    Raises:
        ValueError: if shapes or dtypes do not fit together.
    """
    out = torch.empty_like(x) if out is None else out
    _check(x, slots, gates, weights, page_format, out, pending, partial, finish)
    if torch.compiler.is_compiling():
        ordered = [weights[name] for name, *_ in page_format.parts]
        run, weights, page_format = torch.ops.cachemoe.experts, ordered, page_format.encoded
    else:
        run = _compute
    run(x, slots, gates, weights, page_format, out, pending, partial, finish, among, most)
    return out


def experts_read_through(
    x: torch.Tensor,
    slots: torch.Tensor,
    gates: torch.Tensor,
    pool: torch.Tensor,
    store: torch.Tensor,
    pages: torch.Tensor,
    page_format: PageFormat,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``experts`` for one token, reading missing pages from the store and writing them into their slots in one pass.

    Args:
        x: ``[1, H]``.
        slots: ``[1, K]`` int64, distinct but for the -1 of dropped experts.
        gates: ``[1, K]`` float32.
        pool: ``[S, page_bytes]`` uint8; the slots of misses are written.
        store: ``[N, page_bytes]`` uint8 in memory that the pool's device can read: its own, or pinned on the host; not
            the slots that are written.
        pages: ``[1, K]`` int64, the page to read through; -1: the slot holds it, or the expert is dropped.
        page_format: layout of the pages.
        out: ``[1, H]`` in x's dtype, written; made if None.

    Returns:
        ``out``.

    Raises:
        ValueError: if there is more than one token (two that miss the same expert would race), shapes or dtypes do not
            fit together, or a GPU could not read the store.
    """
    out = torch.empty_like(x) if out is None else out
    if slots.shape[0] != 1 or pages.shape != slots.shape or pages.dtype != torch.int64:
        raise ValueError(
            f"reading through is for one token: slots {tuple(slots.shape)}, pages {tuple(pages.shape)} int64"
        )
    if store.dtype != torch.uint8 or store.shape[1:] != pool.shape[1:] or store.stride() != pool.stride():
        raise ValueError(f"a store of {tuple(store.shape)} pages cannot be read into a pool of {tuple(pool.shape)}")
    _check(x, slots, gates, page_format.views(pool), page_format, out, None, None, True)
    run = torch.ops.cachemoe.experts_read_through if torch.compiler.is_compiling() else _run_through
    run(x, slots, gates, pool, store, pages, page_format.encoded, out)
    return out


def _check(x, slots, gates, weights, page_format, out, pending, partial, finish):
    if x.dim() != 2 or slots.dim() != 2:
        raise ValueError(f"x must be [T, H] and slots [T, K], not {tuple(x.shape)} and {tuple(slots.shape)}")
    (tokens, hidden), chosen = x.shape, slots.shape
    _check_one("slots", slots, torch.int64, chosen if chosen[0] == tokens else (tokens, -1))
    _check_one("gates", gates, torch.float32, chosen)
    _check_one("x", x, x.dtype, x.shape)
    _check_one("out", out, x.dtype, x.shape)
    if pending is not None:
        _check_one("pending", pending, torch.bool, chosen)
    if partial is not None:
        _check_one("partial", partial, torch.float32, (*chosen, hidden))
    if hidden != page_format.hidden:
        raise ValueError(f"x must be {page_format.hidden} wide, not {tuple(x.shape)}")
    for name, _, _, dtype, shape in page_format.parts:
        _check_one(name, weights[name], dtype, shape, 1)  # from slot to slot they may be strided
    if partial is None and (pending is not None or not finish):
        raise ValueError("computing some pairs now needs `partial` to keep their results")


def _check_one(name, tensor, dtype, shape, first=0):
    """Whether a tensor is contiguous and what it must be, its dimensions before ``first`` aside."""
    if tensor.dtype != dtype or tensor.shape[first:] != shape:
        expected = (*tensor.shape[:first], *shape)
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} {expected}")
    if not (tensor[0] if first else tensor).is_contiguous():
        raise ValueError(f"{name} must be contiguous; its strides are {tensor.stride()}")


def _run(
    x: torch.Tensor,
    slots: torch.Tensor,
    gates: torch.Tensor,
    weights: list[torch.Tensor],
    page_format: str,
    out: torch.Tensor,
    pending: torch.Tensor | None,
    partial: torch.Tensor | None,
    finish: bool,
    among: int | None,
    most: Sequence[int] | None,
) -> None:
    page_format = PageFormat.decode(page_format)
    named = dict(zip((name for name, *_ in page_format.parts), weights, strict=True))
    _compute(x, slots, gates, named, page_format, out, pending, partial, finish, among, most)


def _compute(x, slots, gates, weights, page_format, out, pending, partial, finish, among, most):
    if not x.is_cuda:
        experts_cpu.experts(x, slots, gates, weights, page_format, out, pending, partial, finish)
        return
    from cachemoe.kernels.experts_decode import plan_decode  # here, since not every machine has triton
    from cachemoe.kernels.experts_prefill import plan_prefill

    h = x.new_empty(slots.numel(), page_format.intermediate)
    if slots.numel() <= DECODE_PAIRS:
        launches = plan_decode(x, slots, gates, weights, page_format, out, h, pending, partial, finish)
    else:
        pairs = x.new_empty(*slots.shape, x.shape[1], dtype=torch.float32) if partial is None else partial
        launches = plan_prefill(x, slots, gates, weights, page_format, out, h, pairs, pending, finish, among, most)
    for launch in launches:
        launch.run()


def _run_through(
    x: torch.Tensor,
    slots: torch.Tensor,
    gates: torch.Tensor,
    pool: torch.Tensor,
    store: torch.Tensor,
    pages: torch.Tensor,
    page_format: str,
    out: torch.Tensor,
) -> None:
    page_format = PageFormat.decode(page_format)
    weights = page_format.views(pool)
    if not x.is_cuda:
        missing = pages >= 0
        fetch(store, pool, pages[missing], slots[missing], missing.sum().view(1))
        experts_cpu.experts(x, slots, gates, weights, page_format, out)
        return
    check_gpu_can_read(store)
    from cachemoe.kernels.experts_decode import plan_decode

    h = x.new_empty(slots.numel(), page_format.intermediate)
    source = page_format.views(store)
    for launch in plan_decode(x, slots, gates, weights, page_format, out, h, source=pages, source_weights=source):
        launch.run()


# The operators are for torch.compile; eager calls spare their dispatch.
torch.library.custom_op("cachemoe::experts", _run, mutates_args=("out", "partial")).register_fake(lambda *_: None)
torch.library.custom_op("cachemoe::experts_read_through", _run_through, mutates_args=("pool", "out")).register_fake(
    lambda *_: None
)
