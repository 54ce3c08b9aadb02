"""Experts on the CPU: an expert, or a few side by side, over their pages, and the same call as the kernels make."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F

from cachemoe.kernels import quantized_cpu
from cachemoe.kernels.activations import activate
from cachemoe.kernels.formats import FLOATS, PageFormat
from cachemoe.kernels.one_row import ONE_ROW

FEW_TOKENS = 8  # of quantised pages: beyond, taking a matrix apart once and a plain matmul is faster


def side_by_side(
    x: torch.Tensor, weights: dict[str, torch.Tensor], slots: torch.Tensor, page_format: PageFormat
) -> torch.Tensor:
    """Apply several experts to the same tokens.

    Args:
        x: ``[n, H]`` contiguous float32 or bfloat16.
        weights: ``PageFormat.views`` of pages ``[S, page_bytes]``.
        slots: ``[J]`` int64, where the experts are.
        page_format: layout of the pages.

    Returns:
        ``[J, n, H]`` float32; an expert's bits do not depend on the others.
    """
    if page_format.kind not in FLOATS:
        if x.dtype == torch.float16:  # which the C does not know
            x = x.float()
        if len(x) <= FEW_TOKENS and quantized_cpu.has_c():
            return quantized_cpu.experts(x, weights, slots, page_format)
    h = activate(_linear(x[None], weights, "gate_up", slots, page_format), page_format)
    return _linear(h.to(x.dtype), weights, "down", slots, page_format).float()


def _linear(x, weights, name, slots, page_format):
    """``[J, n, rows]``: one matrix of each slot times x ``[1 or J, n, columns]``, with its bias."""
    weight = weights[name]
    if page_format.kind in FLOATS:
        with ONE_ROW if x.shape[1] == 1 else nullcontext():
            y = torch.stack([F.linear(rows, weight[slot].to(x.dtype)) for rows, slot in _paired(x, slots)])
    else:
        pairs = ((rows, _numbers(weights, name, slot, page_format, x.dtype)) for rows, slot in _paired(x, slots))
        y = torch.stack([F.linear(rows, numbers) for rows, numbers in pairs])
    return y + weights[f"{name}_bias"][slots, None].to(y.dtype) if page_format.bias else y


def _paired(x, slots):
    """Each slot with its rows of x."""
    return zip(x.expand(len(slots), -1, -1), slots.tolist(), strict=True)


def _numbers(weights, name, slot, page_format, dtype):
    """``[rows, columns]`` of a quantised page, rounded to x's dtype."""
    matrix = weights[name][slot], weights[f"{name}_scales"][slot]
    return quantized_cpu.numbers(*matrix, page_format.bits, page_format.group, dtype)


def experts(
    x: torch.Tensor,
    slots: torch.Tensor,
    gates: torch.Tensor,
    weights: dict[str, torch.Tensor],
    page_format: PageFormat,
    out: torch.Tensor,
    pending: torch.Tensor | None = None,
    partial: torch.Tensor | None = None,
    finish: bool = True,
) -> None:
    """As ``cachemoe.kernels.experts.experts``, into ``out``."""
    if len(x) == 1:
        _one_token(x, slots[0], gates, weights, page_format, out, pending, partial, finish)
        return
    pairs = torch.empty(*slots.shape, x.shape[1], dtype=torch.float32, device=x.device) if partial is None else partial
    wanted = slots if pending is None else slots.masked_fill(~pending, -1)
    if len(x) <= FEW_TOKENS and in_c(x, page_format):
        now = wanted >= 0
        pairs[now] = quantized_cpu.pairs(x, weights, wanted.tolist(), page_format)[now]
    else:
        for slot in wanted.unique():
            if slot < 0:
                continue
            tokens, ks = torch.nonzero(wanted == slot, as_tuple=True)
            pairs[tokens, ks] = side_by_side(x[tokens], weights, slot[None], page_format)[0]
    if finish:
        if (dropped := slots < 0).any():
            pairs[dropped], gates = 0.0, gates.masked_fill(dropped, 0.0)
        out.copy_(torch.bmm(gates[:, None], pairs)[:, 0])


def in_c(x: torch.Tensor, page_format: PageFormat) -> bool:
    """Whether tokens like x are computed in C: on the CPU, in a dtype that it knows, of quantised pages."""
    return (
        x.dtype in quantized_cpu.DTYPES and not x.is_cuda and page_format.kind not in FLOATS and quantized_cpu.has_c()
    )


def _one_token(x, slots, gates, weights, page_format, out, pending, partial, finish):
    """Decode: nothing to gather, and so little work that every operation counts."""
    all_slots = slots.tolist()
    kept = None if min(all_slots) >= 0 else (slots >= 0).nonzero().flatten()
    if finish and pending is None and kept is None and in_c(x, page_format):
        quantized_cpu.token(x, weights, all_slots, *gates.tolist(), page_format, out)
        return
    if pending is None:
        pairs = side_by_side(x, weights, slots if kept is None else slots[kept], page_format)[:, 0]
        if not finish:
            partial[0, slice(None) if kept is None else kept] = pairs
    else:
        now = pending[0] if kept is None else pending[0] & (slots >= 0)
        if (ks := now.nonzero().flatten()).numel():
            partial[0, ks] = side_by_side(x, weights, slots[ks], page_format)[:, 0]
        pairs = partial[0] if kept is None else partial[0, kept]
    if finish:
        gates = gates if kept is None else gates[:, kept]
        if x.dtype in quantized_cpu.DTYPES and quantized_cpu.has_c():  # the same sum whichever levels have computed
            quantized_cpu.weigh(*gates.tolist(), pairs.contiguous(), list(range(len(pairs))), out)
        else:
            out.copy_(torch.mm(gates, pairs))
