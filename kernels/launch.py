"""Launch: one kernel launch as data, so that what runs on a GPU is also what is compiled ahead of time without one."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

TRITON_TYPES = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


@dataclass(frozen=True)
class Launch:
    """What ``kernel[grid](**arguments, **constants)`` needs.

    A launcher is a pure function from tensors to launches: given tensors on the meta device it plans the same launches,
    which ``cachemoe.benchmarks.compile`` compiles for any GPU.

    Args:
        kernel: a ``triton.jit`` function.
        grid: programs along up to three axes.
        arguments: tensors, numbers and None by parameter name.
        constants: ``tl.constexpr`` parameters by name.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline of loops around ``tl.dot``; other loops name their own.
        streams_pages: the claim that it reads pages 16 bytes a thread, to which the compiled code is held.
        pipelined: the claim that loads run ahead of the loop that needs them, likewise.
        max_registers: of a thread; named, it keeps the assembler from spilling a few to fit more programs at a time.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    streams_pages: bool = False
    pipelined: bool = False
    max_registers: int | None = None

    def run(self) -> None:
        """Queue the launch on the current stream of the tensors' device, or interpret it on the CPU's tensors."""
        devices = (
            value.device for value in self.arguments.values() if isinstance(value, torch.Tensor) and value.is_cuda
        )
        device = next(devices, None)
        with torch.cuda.device(device) if device else nullcontext():  # Triton launches on the current one
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options())

    def options(self) -> dict[str, int | None]:
        """What the compiler is told."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}

    def signature(self) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list]]:
        """The launch as Triton specialises it: the types, constants and known divisibilities of ``ASTSource``.

        Triton turns None and 1 into constants and notes pointers and integers that 16 divides.
        """
        types, constants, attributes = {}, {}, {}
        for position, name in enumerate(self.kernel.arg_names):
            value = self.constants[name] if name in self.constants else self.arguments[name]
            if name in self.constants or value is None or (type(value) is int and value == 1):
                types[name], constants[(position,)] = "constexpr", value
            elif isinstance(value, (bool, float)):
                types[name] = "u1" if isinstance(value, bool) else "fp32"
            else:
                if isinstance(value, int):
                    types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                    address = value
                else:
                    types[name] = "*" + TRITON_TYPES[value.dtype]
                    address = value.storage_offset() * value.element_size()
                if address % 16 == 0:
                    attributes[(position,)] = [["tt.divisibility", 16]]
        return types, constants, attributes
