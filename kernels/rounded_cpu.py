"""A dense matrix in int8 or int4, times tokens on the CPU."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cachemoe.kernels import quantized_cpu
from cachemoe.kernels.experts_cpu import FEW_TOKENS
from cachemoe.kernels.formats import GROUPS
from cachemoe.kernels.quantize import pack_matrix

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
        bits, group = KINDS[kind], _group(weight.shape[1], kind)
        return cls(*pack_matrix(weight, bits, group), bits, group)

    @staticmethod
    def size(rows: int, columns: int, kind: str) -> int:
        """``nbytes`` of a matrix of so many rows and columns that has been rounded so."""
        scales = rows * 4 if kind == "int8" else rows * (columns // _group(columns, kind)) * 2 * 2
        return rows * columns * KINDS[kind] // 8 + scales

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
        return quantized_cpu.numbers(self.packed, self.scales, self.bits, self.group, dtype)

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, rows]``, in float32 or in x's dtype, of x ``[T, columns]`` floating point.

        Few tokens are multiplied as the matrix lies; for more it is taken apart once.
        """
        if len(x) > FEW_TOKENS or not quantized_cpu.has_c():
            return F.linear(x, self.numbers(x.dtype))
        rows = (x if x.dtype == torch.bfloat16 else x.float()).contiguous()
        return quantized_cpu.linear(rows, self.packed, self.scales, self.bits, self.group)


def _group(columns: int, kind: str) -> int:
    """Columns that share a scale: the most that divide the columns; 0 of int8."""
    return 0 if kind == "int8" else next(each for each in reversed(GROUPS) if columns % each == 0)
