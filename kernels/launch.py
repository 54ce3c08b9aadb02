"""Launch: one kernel launch as data, so that what runs on a GPU is also what is compiled ahead of time without one."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """What ``kernel[grid](**arguments, **constants)`` needs.

    A launcher is a pure function from tensors to launches: given tensors on the meta device it plans the same launches,
    which can be compiled for any GPU.

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
        fuses: whether the compiler may round a product and a sum of it once, where other implementations round twice.
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
    fuses: bool = True

    def run(self) -> None:
        """Queue the launch on the current stream of the tensors' device, or interpret it on the CPU's tensors."""
        devices = (
            value.device for value in self.arguments.values() if isinstance(value, torch.Tensor) and value.is_cuda
        )
        device = next(devices, None)
        with torch.cuda.device(device) if device else nullcontext():  # Triton launches on the current one
            self.kernel[self.grid](**self._keywords())

    def compile(self) -> Any:
        """The kernel as Triton specialises and compiles it for its active driver's GPU, without launching it.

        It goes into Triton's cache, where ``run`` will find it.
        """
        return self.kernel.warmup(grid=self.grid, **self._keywords())

    def _keywords(self) -> dict[str, Any]:
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
            "enable_fp_fusion": self.fuses,
        }
        return {**self.arguments, **self.constants, **options}
