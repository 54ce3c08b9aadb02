"""Page formats: how one expert's weights lie in one contiguous page of bytes, and what is computed with them.

A page holds ``gate_up`` and then ``down``, each followed by its scales and its bias where it has them. Every part
starts at a multiple of 16 bytes, for wide loads, and the page ends at a multiple of 4 KiB, for O_DIRECT.

- ``bf16``, ``fp16``, ``fp32``: as they are.
- ``int8``: a float32 scale for each output channel.
- ``int4``, ``int2``: two or four values a byte, consecutive along the input dimension, with a bfloat16 scale and zero
  for each group of them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property

import torch

from cachemoe.kernels.quantize import pack_matrix, unpack_matrix

PAGE_ALIGNMENT = 4096
PART_ALIGNMENT = 16
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GROUPED = {"int4": 4, "int2": 2}  # bits of a value; the values of a group share a scale and a zero
KINDS = (*FLOATS, "int8", *GROUPED)
GROUPS = (32, 64, 128)
LARGEST = 1 << 24  # a dimension: the bytes of a page stay far below 2^63
ACTIVATIONS = ("silu", "gelu", "relu", "clamped-swiglu")


@dataclass(frozen=True)
class PageFormat:
    """Layout of one expert's page, and the expert: y = down(act(gate(x)) * up(x)), or y = down(act(up(x))).

    Args:
        kind: one of ``KINDS``.
        hidden: H, the model dimension.
        intermediate: I, the expert's inner dimension.
        group: values that share a scale and a zero along the input dimension; 0 where none do.
        gated: whether ``gate_up`` has 2I rows, gate and up, or I.
        activation: one of ``ACTIVATIONS``; ``clamped-swiglu``, gated only, is gpt-oss's.
        bias: whether each matrix has one, in float32.
        interleaved: whether the gate rows are 0, 2, 4, ... and up 1, 3, 5, ..., as gpt-oss has them, or gate first.

    Raises:
        ValueError: for an unknown kind or activation, or for dimensions the kind cannot hold.
    """

    kind: str
    hidden: int
    intermediate: int
    group: int = 0
    gated: bool = True
    activation: str = "silu"
    bias: bool = False
    interleaved: bool = False

    def __post_init__(self):
        for field in fields(self):
            if type(value := getattr(self, field.name)).__name__ != field.type:
                raise ValueError(f"{field.name} of a page must be {field.type}, not {value!r}")
        if self.kind not in KINDS:
            raise ValueError(f"unknown page format {self.kind!r}: use {', '.join(KINDS)}")
        if not (1 <= self.hidden < LARGEST and 1 <= self.intermediate < LARGEST):
            raise ValueError(f"a page needs positive dimensions below {LARGEST}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}: use {', '.join(ACTIVATIONS)}")
        if not self.gated and (self.activation == "clamped-swiglu" or self.interleaved):
            raise ValueError("an expert without a gate can neither be interleaved nor use clamped-swiglu")
        if self.kind not in GROUPED:
            if self.group != 0:
                raise ValueError(f"{self.kind} pages have no groups: leave group at 0")
        elif self.group not in GROUPS:
            raise ValueError(f"{self.kind} pages have groups of {GROUPS}, not {self.group}")
        elif self.hidden % self.group or self.intermediate % self.group:
            raise ValueError(
                f"{self.kind} pages need H and I divisible by the group: H={self.hidden}, I={self.intermediate}, "
                f"group={self.group}"
            )
        for name in ("encoded", "parts"):  # torch.compile wants them made: before Python 3.12 they take a lock
            getattr(self, name)

    @cached_property
    def encoded(self) -> str:
        """The format as text, which a ``torch.library`` operator can take."""
        return json.dumps(asdict(self))

    @staticmethod
    @cache
    def decode(text: str) -> PageFormat:
        """The format of ``encoded``."""
        return PageFormat(**json.loads(text))

    @cached_property
    def parts(self) -> tuple[tuple[str, int, int, torch.dtype, tuple[int, ...]], ...]:
        """(name, first byte, bytes, dtype, shape) of each tensor in the page, in file order."""
        parts, start = [], 0
        for name, (rows, columns) in zip(("gate_up", "down"), self._matrices, strict=True):
            if self.kind in FLOATS:
                tensors = [(name, FLOATS[self.kind], (rows, columns))]
            elif self.kind == "int8":
                tensors = [(name, torch.int8, (rows, columns)), (f"{name}_scales", torch.float32, (rows,))]
            else:
                scales = (f"{name}_scales", torch.bfloat16, (rows, columns // self.group, 2))
                tensors = [(name, torch.uint8, (rows, columns * self.bits // 8)), scales]
            if self.bias:
                tensors.append((f"{name}_bias", torch.float32, (rows,)))
            for part, dtype, shape in tensors:
                size = torch.Size(shape).numel() * dtype.itemsize
                parts.append((part, start, size, dtype, shape))
                start = -(-(start + size) // PART_ALIGNMENT) * PART_ALIGNMENT
        return tuple(parts)

    @property
    def bits(self) -> int:
        """Bits of a value."""
        return GROUPED.get(self.kind) or 8 * self.parts[0][3].itemsize

    @property
    def _matrices(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(rows, columns) of gate_up and of down."""
        rows = (2 if self.gated else 1) * self.intermediate
        return (rows, self.hidden), (self.hidden, self.intermediate)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes that computing with the expert reads."""
        return sum(size for _, _, size, _, _ in self.parts)

    @cached_property
    def page_bytes(self) -> int:
        """Bytes that fetching the expert moves: the weights rounded up to 4 KiB."""
        _, start, size, _, _ = self.parts[-1]
        return -(-(start + size) // PAGE_ALIGNMENT) * PAGE_ALIGNMENT

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of x that is fastest on the CPU."""
        return torch.bfloat16 if self.group else torch.float32

    def views(self, pages: torch.Tensor) -> dict[str, torch.Tensor]:
        """The pages' tensors by name, without a copy, in the order of ``parts``.

        Args:
            pages: ``[..., page_bytes]`` uint8, each page starting at a multiple of 16 bytes.

        Returns:
            Tensors ``[..., *shape]``, strided by page.
        """
        return {
            name: pages[..., first : first + size].view(dtype).unflatten(-1, shape)
            for name, first, size, dtype, shape in self.parts
        }

    def pack(
        self,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One expert's weights as a page.

        Args:
            gate_up: ``[2I, H]`` (ungated: ``[I, H]``) floating point, rows in the format's order.
            down: ``[H, I]`` floating point.
            gate_up_bias, down_bias: ``[rows]`` floating point, where the format has biases.

        Returns:
            ``[page_bytes]`` uint8.

        Raises:
            ValueError: if a shape is not the format's, or biases are given or left out against it.
        """
        shapes = (tuple(gate_up.shape), tuple(down.shape))
        if shapes != self._matrices:
            raise ValueError(f"the expert has shapes {shapes[0]}, {shapes[1]}; expected {self._matrices}")
        if {gate_up_bias is not None, down_bias is not None} != {self.bias}:
            raise ValueError(f"biases {'are missing' if self.bias else 'were given'}, and bias={self.bias}")
        page = torch.zeros(self.page_bytes, dtype=torch.uint8)
        tensors = {}
        for name, weight, bias in (("gate_up", gate_up, gate_up_bias), ("down", down, down_bias)):
            if self.kind in FLOATS:
                tensors[name] = weight
            else:
                tensors[name], tensors[f"{name}_scales"] = pack_matrix(weight, self.bits, self.group)
            if bias is not None:
                tensors[f"{name}_bias"] = bias
        for name, view in self.views(page).items():
            view.copy_(tensors[name])
        return page

    def dequantized(self, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        """float32 ``[..., rows, columns]`` of ``gate_up`` or ``down``, from ``views``."""
        if self.kind in FLOATS:
            return weights[name].float()
        return unpack_matrix(weights[name], weights[f"{name}_scales"], self.bits)
