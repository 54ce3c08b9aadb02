"""What kernels/formats.py and kernels/experts.py do not have yet; this file goes when they do.

``page_tensors`` becomes ``PageFormat.views``, ``dequantized`` its method, ``INT4_CPU`` "int4-cpu", ``experts`` and
``FLOATS`` come from ``kernels``, and nothing is ``NOT_YET``.
"""

import torch

from cachemoe.kernels.experts import expert
from cachemoe.kernels.formats import PageFormat

FLOATS = {"bf16": torch.bfloat16}
INT4_CPU = "int4"
NOT_YET = ("gpt-oss-20b",)  # biases and its activation


def page_tensors(pages: torch.Tensor, page_format: PageFormat) -> dict[str, torch.Tensor]:
    """``[S, ...]`` tensors of ``[S, page_bytes]`` pages by name, without a copy."""
    return {
        name.removesuffix("_zeros"): pages[:, first : first + size].view(dtype).unflatten(-1, shape)
        for name, first, size, dtype, shape in page_format.parts
    }


def dequantized(page_format: PageFormat, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """float32 ``gate_up`` and ``down`` of bf16 pages."""
    if page_format.kind not in FLOATS:
        raise ValueError(f"{page_format.kind} pages cannot be taken apart")
    return {name: tensor.float() for name, tensor in weights.items()}


def experts(
    x: torch.Tensor,
    slots: torch.Tensor,
    gates: torch.Tensor,
    weights: dict[str, torch.Tensor],
    page_format: PageFormat,
) -> torch.Tensor:
    """``[T, H]`` from x ``[T, H]``, slots and gates ``[T, K]`` and ``[S, ...]`` weights."""
    y = torch.zeros_like(x)
    for slot in slots.unique().tolist():
        token, k = torch.where(slots == slot)
        out = expert(x[token], tuple(tensor[slot] for tensor in weights.values()), page_format) * gates[token, k, None]
        y.index_add_(0, token, out.to(y.dtype))
    return y
