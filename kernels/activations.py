"""What an expert does between its matrices: the names are ``formats.ACTIVATIONS``."""

import torch
import torch.nn.functional as F

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
