"""What an expert does between its matrices, in PyTorch and in Triton: the names are ``formats.ACTIVATIONS``."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from cachemoe.kernels.formats import PageFormat

CLAMP, SLOPE = 7.0, 1.702  # gpt-oss's


def activate(rows: torch.Tensor, page_format: PageFormat) -> torch.Tensor:
    """``[..., I]`` from rows of gate and up ``[..., 2I]`` in the format's order, or ``[..., I]`` without a gate."""
    if not page_format.gated:
        return _ACTIVATIONS[page_format.activation](rows)
    gate, up = (rows[..., ::2], rows[..., 1::2]) if page_format.interleaved else rows.chunk(2, -1)
    if page_format.activation == "clamped-swiglu":
        gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
        return gate * torch.sigmoid(SLOPE * gate) * (up + 1)
    return _ACTIVATIONS[page_format.activation](gate) * up


_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


@triton.jit
def activate_tile(gate, up, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """``activate`` of float32 tiles; without a gate, ``gate`` is not looked at."""
    if ACTIVATION == "clamped-swiglu":
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0)
        result = gate * tl.sigmoid(1.702 * gate) * (up + 1.0)
    else:
        z = gate if GATED else up
        if ACTIVATION == "silu":
            result = z * tl.sigmoid(z)
        elif ACTIVATION == "gelu":
            result = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
        else:
            result = tl.maximum(z, 0.0)
        if GATED:
            result *= up
    return result
