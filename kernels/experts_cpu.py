"""Experts on the CPU, in PyTorch: one expert over its page, and the same call as the kernels make."""

from threading import Lock

import torch
import torch.nn.functional as F

from cachemoe.kernels.activations import activate
from cachemoe.kernels.formats import FLOATS, PageFormat

_ONE_AT_A_TIME = Lock()  # what two threads save and restore in turns is lost


def expert(x: torch.Tensor, weights: dict[str, torch.Tensor], page_format: PageFormat) -> torch.Tensor:
    """Apply one expert to the tokens that chose it.

    Args:
        x: ``[n, H]`` floating point; bfloat16 for int4-cpu pages.
        weights: ``PageFormat.views`` of the expert's page.
        page_format: layout of that page. int4 pages, which are for GPUs, are taken apart at every call.

    Returns:
        ``[n, H]`` in x's dtype.

    Raises:
        TypeError: for int4-cpu pages and an x that is not bfloat16 (torch's float32 path is some 30 times slower).
    """
    if page_format.kind == "int4-cpu" and x.dtype != torch.bfloat16:
        raise TypeError(f"int4-cpu pages compute in bfloat16, and x is {x.dtype}: convert it first")
    return _linear(activate(_linear(x, weights, "gate_up", page_format), page_format), weights, "down", page_format)


def _linear(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str, page_format: PageFormat) -> torch.Tensor:
    """``[n, rows]``: one of the page's matrices times x, with its bias."""
    weight = weights[name]
    if page_format.kind in FLOATS:
        y = (_one_row if len(x) == 1 else F.linear)(x, weight.to(x.dtype))
    elif page_format.kind == "int8":
        y = torch.ops.aten._weight_int8pack_mm(x, weight, weights[f"{name}_scales"].to(x.dtype))
    elif page_format.kind == "int4-cpu":
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, page_format.group, weights[f"{name}_scales"])
    else:
        y = F.linear(x, page_format.dequantized(weights, name).to(x.dtype))
    return y + weights[f"{name}_bias"].to(y.dtype) if page_format.bias else y


def _one_row(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``F.linear`` of one row by torch's own kernel: oneDNN's reads bfloat16 weights at half the speed of memory."""
    with _ONE_AT_A_TIME:
        enabled = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.enabled = False
        try:
            return F.linear(x, weight)
        finally:
            torch.backends.mkldnn.enabled = enabled


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
    if len(x) == 1 and partial is None:  # decode: nothing to gather
        pages = ({name: weight[slot] for name, weight in weights.items()} for slot in slots[0].tolist())
        pairs = torch.cat([expert(x, page, page_format) for page in pages])[None].float()
    else:
        pairs = x.new_empty((*slots.shape, x.shape[1]), dtype=torch.float32) if partial is None else partial
        wanted = slots if pending is None else slots.masked_fill(~pending, -1)
        for slot in dict.fromkeys(wanted.flatten().tolist()):
            if slot >= 0:
                tokens, ks = torch.nonzero(wanted == slot, as_tuple=True)
                page = {name: weight[slot] for name, weight in weights.items()}
                pairs[tokens, ks] = expert(x[tokens], page, page_format).float()
    if finish:
        out.copy_(torch.bmm(gates[:, None], pairs)[:, 0])
