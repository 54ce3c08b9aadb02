"""Page formats: how one expert's weights lie in one contiguous page of bytes.

A page holds ``gate_up`` (``[2I, H]``, gate rows first) and then ``down`` (``[H, I]``), and ends at a multiple of 4 KiB
so that O_DIRECT can read it. ``bf16`` stores both as they are. ``int4`` stores each matrix as torch's packed int4
weight for the CPU (two values a byte, group-wise along the input dimension) followed by its bfloat16 scales and zeros:
w = (q - 8) * scale + zero, the convention of ``torch.ops.aten._weight_int4pack_mm_for_cpu``.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

PAGE_ALIGNMENT = 4096
INT4_GROUPS = (32, 64)


@dataclass(frozen=True)
class PageFormat:
    """Layout of one expert's page.

    Args:
        kind: ``"bf16"`` or ``"int4"``.
        hidden: H, the model dimension.
        intermediate: I, the expert's inner dimension.
        group: values that share a scale and a zero along the input dimension; 0 for bf16.

    Raises:
        ValueError: for an unknown kind, or for dimensions the kind cannot hold.
    """

    kind: str
    hidden: int
    intermediate: int
    group: int = 0

    def __post_init__(self):
        if self.kind not in ("bf16", "int4"):
            raise ValueError(f"unknown page format {self.kind!r}: use 'bf16' or 'int4'")
        if self.hidden < 1 or self.intermediate < 1:
            raise ValueError(f"a page needs positive dimensions, not H={self.hidden} and I={self.intermediate}")
        if self.kind == "bf16" and self.group != 0:
            raise ValueError("bf16 pages have no groups: leave group at 0")
        if self.kind == "int4":
            if self.group not in INT4_GROUPS:
                raise ValueError(f"int4 pages have groups of {INT4_GROUPS}, not {self.group}")
            # torch's packing works on blocks of 32 rows; its groups run along the input dimension.
            if self.hidden % 32 or self.intermediate % 32 or self.hidden % self.group or self.intermediate % self.group:
                raise ValueError(
                    f"int4 pages need H and I divisible by 32 and by the group: H={self.hidden}, "
                    f"I={self.intermediate}, group={self.group}"
                )

    @cached_property
    def parts(self) -> tuple[tuple[str, int, int, torch.dtype, tuple[int, ...]], ...]:
        """(name, first byte, bytes, dtype, shape) of each tensor in the page, in file order."""
        parts, start = [], 0
        for name, rows, columns in (
            ("gate_up", 2 * self.intermediate, self.hidden),
            ("down", self.hidden, self.intermediate),
        ):
            if self.kind == "bf16":
                tensors = [(name, torch.bfloat16, (rows, columns))]
            else:
                tensors = [
                    (name, torch.uint8, (rows, columns // 2)),
                    (f"{name}_scales_zeros", torch.bfloat16, (columns // self.group, rows, 2)),
                ]
            for part, dtype, shape in tensors:
                size = torch.Size(shape).numel() * dtype.itemsize
                parts.append((part, start, size, dtype, shape))
                start += size
        return tuple(parts)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes that computing with the expert reads."""
        return sum(size for _, _, size, _, _ in self.parts)

    @cached_property
    def page_bytes(self) -> int:
        """Bytes that fetching the expert moves: the weights rounded up to 4 KiB."""
        return -(-self.weight_bytes // PAGE_ALIGNMENT) * PAGE_ALIGNMENT

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that one token's input should have on the CPU."""
        return torch.bfloat16 if self.kind == "int4" else torch.float32

    def views(self, page: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The page's tensors, without a copy, in the order of ``parts``.

        Args:
            page: ``[page_bytes]`` uint8, starting at a multiple of 4 bytes.
        """
        return tuple(page[first : first + size].view(dtype).view(shape) for _, first, size, dtype, shape in self.parts)

    def pack(self, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """One expert's weights as a page.

        Args:
            gate_up: ``[2I, H]`` floating point, gate rows first.
            down: ``[H, I]`` floating point.

        Returns:
            ``[page_bytes]`` uint8.

        Raises:
            ValueError: if a shape is not the format's.
        """
        expected = ((2 * self.intermediate, self.hidden), (self.hidden, self.intermediate))
        if (tuple(gate_up.shape), tuple(down.shape)) != expected:
            raise ValueError(f"the expert has shapes {tuple(gate_up.shape)}, {tuple(down.shape)}; expected {expected}")
        page = torch.zeros(self.page_bytes, dtype=torch.uint8)
        tensors = []
        for weight in (gate_up, down):
            tensors += [weight] if self.kind == "bf16" else _pack_int4(*quantize_int4(weight, self.group))
        for view, tensor in zip(self.views(page), tensors, strict=True):
            view.copy_(tensor)
        return page


def quantize_int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric round-to-nearest int4, a scale and a zero for each group along the input dimension.

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
    """``[N, K]`` float32 weights from what ``quantize_int4`` returned."""
    groups = q.float().unflatten(1, (scale.shape[1], -1))
    return ((groups - 8) * scale.float()[..., None] + zero.float()[..., None]).flatten(1)


def _pack_int4(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> list[torch.Tensor]:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    return [packed, torch.stack((scale.t(), zero.t()), dim=-1).contiguous()]


def int4_packing() -> str:
    """Name of this processor's int4 packing: torch interleaves rows by vector width, so pages are not portable.

    Returns:
        Hexadecimal digest of a known matrix as packed here; a store records it and refuses another one.
    """
    known = (torch.arange(64 * 64, dtype=torch.int32) * 7919 % 16).view(64, 64)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(known, 1)
    return format(int((packed.long().flatten() * (torch.arange(packed.numel()) + 1)).sum()), "x")
