"""One expert's feed-forward over its page: y = down(SiLU(gate(x)) * up(x)), on the CPU.

The reference over dense weights is :func:`cachemoe.kernels.reference.experts`.
"""

import torch
import torch.nn.functional as F

from cachemoe.kernels.formats import PageFormat


def expert(x: torch.Tensor, weights: tuple[torch.Tensor, ...], page_format: PageFormat) -> torch.Tensor:
    """Apply one expert to the tokens that chose it.

    Args:
        x: ``[n, H]``; bfloat16 for int4 pages, bfloat16 or float32 for bf16 pages.
        weights: ``PageFormat.views`` of the expert's page.
        page_format: layout of that page.

    Returns:
        ``[n, H]`` in x's dtype.

    Raises:
        TypeError: for int4 pages and an x that is not bfloat16 (torch's float32 path is some 30 times slower).
    """
    if page_format.kind == "bf16":
        gate_up, down = weights
        gate, up = F.linear(x, gate_up.to(x.dtype)).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down.to(x.dtype))
    if x.dtype != torch.bfloat16:
        raise TypeError(f"int4 pages compute in bfloat16, and x is {x.dtype}: convert it first")
    matmul = torch.ops.aten._weight_int4pack_mm_for_cpu
    gate_up, gate_up_scales_zeros, down, down_scales_zeros = weights
    gate, up = matmul(x, gate_up, page_format.group, gate_up_scales_zeros).chunk(2, dim=-1)
    return matmul(F.silu(gate) * up, down, page_format.group, down_scales_zeros)
