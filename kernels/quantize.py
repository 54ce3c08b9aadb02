"""Weights as integers and back: to nearest, with a scale a row (int8) or a scale and a zero a group (int4, int2)."""

from itertools import product

import torch

CUTS = {4: (0.0,), 2: (0.0, 0.0625, 0.125, 0.1875, 0.25)}
"""By bits of a value: what is tried to cut off either end of a group's range, as shares of it.

With four numbers alone a group's extremes are better given up. Of tinymoe's weights, in groups of 32, the whole range
loses 39.3 % at 2 bits (root mean square), equal cuts at both ends 31.5 %, and the best of these 25 pairs 30.0 %; steps
half as wide would lose 29.7 %, for three times the work.
"""

AT_ONCE = 1 << 18  # numbers that are tried together: they stay in the processor's cache


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


def quantize_groups(weight: torch.Tensor, group: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric int4 or int2, a scale and a zero for each group along the input dimension.

    The numbers of a group span its range but for the cuts, of ``CUTS``, that leave the least square error.

    Args:
        weight: ``[N, K]`` floating point, K divisible by ``group``.
        bits: 4 or 2.

    Returns:
        ``q`` ``[N, K]`` int32 from 0 on, below 2**bits, and ``scale`` and ``zero`` ``[N, K / group]`` bfloat16, with
        weight ~ (q - 2**(bits - 1)) * scale + zero.
    """
    rows = max(1, AT_ONCE // (len(CUTS[bits]) ** 2 * weight.shape[1]))
    parts = [_quantized(part.float().unflatten(1, (-1, group)), bits) for part in weight.split(rows)]
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


def _quantized(groups, bits):
    """``quantize_groups`` of values ``[N, K / group, group]`` float32."""
    low, high = groups.amin(-1), groups.amax(-1)
    below, above = groups.new_tensor(list(product(CUTS[bits], repeat=2))).T[..., None, None]
    first, last = low + below * (high - low), high - above * (high - low)
    scale = ((last - first) / (2**bits - 1)).clamp(min=1e-8).bfloat16()
    zero = (first + 2 ** (bits - 1) * scale.float()).bfloat16()
    if len(scale) > 1:
        numbers = _numbers(_nearest(groups, scale, zero, bits), scale, zero, bits)
        best = numbers.sub_(groups).square_().sum(-1).argmin(0, keepdim=True)
        scale, zero = scale.gather(0, best), zero.gather(0, best)
    scale, zero = scale[0], zero[0]
    return _nearest(groups, scale, zero, bits).flatten(1).to(torch.int32), scale, zero


def _nearest(groups, scale, zero, bits):
    """q of each value, ``[N, K / group, group]`` float32.

    Rounded against the stored bfloat16 scale and zero, so that their own rounding is not added to the error.
    """
    q = (groups - zero.float()[..., None]).div_(scale.float()[..., None]).add_(2 ** (bits - 1))
    return q.round_().clamp_(0, 2**bits - 1)


def _numbers(q, scale, zero, bits):
    """What each q stands for."""
    return (q - 2 ** (bits - 1)) * scale.float()[..., None] + zero.float()[..., None]


def dequantize_groups(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """``[..., N, K]`` float32 weights from what ``quantize_groups`` returned."""
    return _numbers(q.float().unflatten(-1, (scale.shape[-1], -1)), scale, zero, bits).flatten(-2)


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
    numbers = values[unpack_bits(blocks, 4).long()]
    return torch.ldexp(numbers, scales.int()[..., None] - 127).flatten(1)


def pack_bits(q: torch.Tensor, bits: int) -> torch.Tensor:
    """``[N, K]`` integers of 4 or 2 bits as ``[N, K * bits / 8]`` uint8: the first of a byte's in its lowest bits."""
    together = q.to(torch.uint8).unflatten(-1, (-1, 8 // bits)).unbind(-1)
    return sum(values << bits * place for place, values in enumerate(together))


def unpack_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """``[..., N, K]`` uint8 below 2**bits from what ``pack_bits`` returned."""
    return torch.stack([packed >> place & 2**bits - 1 for place in range(0, 8, bits)], -1).flatten(-2)


def pack_matrix(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix ``[N, K]`` as a page has it, and its scales: int8, or int4 and int2 with a zero beside each scale.

    Args:
        bits: 8, 4 or 2.
        group: columns that share a scale; not looked at for int8.
    """
    if bits == 8:
        return quantize_int8(weight)
    q, scale, zero = quantize_groups(weight, group, bits)
    return pack_bits(q, bits), torch.stack((scale, zero), -1)


def unpack_matrix(packed: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """``[..., N, K]`` float32 weights from what ``pack_matrix`` returned."""
    if bits == 8:
        return dequantize_int8(packed, scales)
    return dequantize_groups(unpack_bits(packed, bits), *scales.unbind(-1), bits)
