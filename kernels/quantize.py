"""Weights as integers and back: round to nearest, with a scale a row (int8) or a scale and a zero a group (int4)."""

import torch


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8, one scale for each output channel.

    Args:
        weight: ``[N, K]`` floating point.

    Returns:
        ``q`` ``[N, K]`` int8 in -127..127 and ``scale`` ``[N]`` float32, with weight ~ q * scale.
    """
    weight = weight.float()
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)
    return (weight / scale[:, None]).round().to(torch.int8), scale


def dequantize_int8(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``[..., N, K]`` float32 weights from what ``quantize_int8`` returned."""
    return q.float() * scale[..., None]


def quantize_int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric int4, a scale and a zero for each group along the input dimension.

    Args:
        weight: ``[N, K]`` floating point, K divisible by ``group``.

    Returns:
        ``q`` ``[N, K]`` int32 in 0..15, and ``scale`` and ``zero`` ``[N, K / group]`` bfloat16, with
        weight ~ (q - 8) * scale + zero.
    """
    groups = weight.float().unflatten(1, (-1, group))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-8).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    # Rounding against the stored bfloat16 scale and zero, so that their own rounding is not added to the error.
    q = ((groups - zero.float()[..., None]) / scale.float()[..., None] + 8).round().clamp(0, 15)
    return q.flatten(1).to(torch.int32), scale, zero


def dequantize_int4(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """``[..., N, K]`` float32 weights from what ``quantize_int4`` returned."""
    groups = q.float().unflatten(-1, (scale.shape[-1], -1))
    return ((groups - 8) * scale.float()[..., None] + zero.float()[..., None]).flatten(-2)


MXFP4_BLOCK = 32  # values that share a scale
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def dequantize_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Weights of the OCP microscaling format MXFP4 v1.0: E2M1 values, a power of two for every 32 of them.

    Args:
        blocks: ``[N, K / 32, 16]`` uint8, two values a byte, the first in the low half.
        scales: ``[N, K / 32]`` uint8, exponents with a bias of 127.

    Returns:
        ``[N, K]`` bfloat16, exact.
    """
    values = torch.tensor(FP4_VALUES, dtype=torch.bfloat16)
    numbers = values[unpack_nibbles(blocks).long()]
    return torch.ldexp(numbers, scales.int()[..., None] - 127).flatten(1)


def pack_nibbles(q: torch.Tensor) -> torch.Tensor:
    """``[N, K]`` integers in 0..15 as ``[N, K / 2]`` uint8: byte j has k = 2j low and k = 2j + 1 high."""
    pairs = q.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """``[..., N, K]`` uint8 in 0..15 from what ``pack_nibbles`` returned."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
