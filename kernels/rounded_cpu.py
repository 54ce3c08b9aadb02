"""A dense matrix in int8 or int4, times tokens on the CPU."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cachemoe.kernels import quantized_cpu
from cachemoe.kernels.experts_cpu import FEW_TOKENS
from cachemoe.kernels.formats import GROUPS
from cachemoe.kernels.quantize import (
    dequantize_groups,
    dequantize_int8,
    pack_bits,
    quantize_groups,
    quantize_int8,
    unpack_bits,
)

KINDS = {"int8": 8, "int4": 4}  # bits of a value


@dataclass(frozen=True, eq=False)
class Rounded:
    """A matrix as one of a page is: int8 with a scale a row, or int4 with a scale and a zero a group.

    Args:
        packed: ``[rows, columns]`` int8, or ``[rows, columns / 2]`` uint8 of int4.
        scales: ``[rows]`` float32, or ``[rows, columns / group, 2]`` bfloat16.
        bits: of a value.
        group: columns that share a scale; 0 of int8.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    bits: int
    group: int

    @classmethod
    def of(cls, weight: torch.Tensor, kind: str) -> "Rounded":
        """Round a matrix ``[rows, columns]``, of which int4 wants columns that a group divides; see ``fits``."""
        if kind == "int8":
            return cls(*quantize_int8(weight), 8, 0)
        group = next(group for group in reversed(GROUPS) if weight.shape[1] % group == 0)
        q, *pair = quantize_groups(weight, group, KINDS[kind])
        return cls(pack_bits(q, KINDS[kind]), torch.stack(pair, -1).contiguous(), KINDS[kind], group)

    @staticmethod
    def fits(columns: int, kind: str) -> bool:
        """Whether a matrix of so many columns can be rounded so."""
        return kind == "int8" or columns % GROUPS[0] == 0

    @property
    def columns(self) -> int:
        return self.packed.shape[1] * 8 // self.bits

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        """``[rows, columns]`` in that dtype."""
        if dtype in (torch.float32, torch.bfloat16) and quantized_cpu.has_c():
            return quantized_cpu.unpack(self.packed, self.scales, self.bits, self.group, dtype)
        quantized_cpu.warn_without_c()
        if self.bits == 8:
            return dequantize_int8(self.packed, self.scales).to(dtype)
        return dequantize_groups(unpack_bits(self.packed, self.bits), *self.scales.unbind(-1), self.bits).to(dtype)

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, rows]``, in float32 or in x's dtype, of x ``[T, columns]`` floating point.

        Few tokens are multiplied as the matrix lies; for more it is taken apart once.
        """
        if len(x) > FEW_TOKENS or not quantized_cpu.has_c():
            return F.linear(x, self.numbers(x.dtype))
        return quantized_cpu.matrix(
            (x if x.dtype == torch.bfloat16 else x.float()).contiguous(),
            *(self.packed, self.scales, self.bits, self.group),
        )
