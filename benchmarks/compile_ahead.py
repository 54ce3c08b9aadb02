"""Compile launches ahead of time for a GPU that need not be there, and read from the result what each kernel uses."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from cachemoe.kernels.launch import Launch

SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
"""KiB of shared memory that one block may use, by compute capability (CUDA C++ Programming Guide)."""

# What libdevice's erf flushes in Triton's build: a tiny argument and its tiny result, to which gelu adds 1.
FLUSHED_BY_ERF = {"abs.ftz.f32": 1, "fma.rn.ftz.f32": 7, "ex2.approx.ftz.f32": 1}


class AbsentGPU:
    """As much of a Triton driver as compiling asks for: the GPU that it is for.

    Args:
        capability: compute capability, such as 90.
    """

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses; the last five count instructions of its PTX.

    Args:
        registers: of a thread.
        shared: bytes of shared memory of a block.
        stack: bytes of stack of a thread: registers that were spilled.
        wide_loads: loads of 16 bytes a thread from global memory, into registers or shared memory.
        asynchronous: copies from global to shared memory that do not wait (cp.async, TMA).
        tensor_core: matrix instructions.
        flushing: arithmetic that takes numbers below 2**-126 for 0, but for that within erf.
        float_atomics: additions and the like of floating point numbers in memory.
    """

    registers: int
    shared: int
    stack: int
    wide_loads: int
    asynchronous: int
    tensor_core: int
    flushing: int
    float_atomics: int


def compile_launch(launch: Launch, capability: int) -> Any:
    """One launch compiled for a compute capability such as 90: Triton's ``CompiledKernel``.

    Raises:
        RuntimeError: if TRITON_INTERPRET is set: an interpreted kernel cannot be compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("unset TRITON_INTERPRET to compile kernels")
    driver.set_active(AbsentGPU(capability))
    try:
        return launch.compile()
    finally:
        driver.set_active(None)  # Triton looks for the machine's own when it next needs one


def told(compiled: Any, tool: str, option: str) -> str:
    """What one of CUDA's tools, as Triton brings them, says of what ``compile_launch`` gave."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [Path(triton.__file__).parent / "backends/nvidia/bin" / tool, option, path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_resources(compiled: Any) -> Resources:
    """What a kernel uses, from what ``compile_launch`` gave."""
    usage = told(compiled, "cuobjdump", "-res-usage")
    ptx = compiled.asm["ptx"]
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Resources(
        registers=found["REG"],
        shared=compiled.metadata.shared,
        stack=found["STACK"],
        wide_loads=len(re.findall(r"\bld\.global\S*\.(?:v4\.b32|v2\.b64)|\bcp\.async\.c[ag]\S* .*, 0x10\b", ptx)),
        asynchronous=len(re.findall(r"\bcp\.async\.(?:c[ag]|bulk\.tensor)\b", ptx)),
        tensor_core=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
        flushing=_flushing(ptx),
        float_atomics=len(re.findall(r"\b(?:atom|red)\.\S*\.b?f(?:16|32|64)", ptx)),
    )


def _flushing(ptx: str) -> int:
    """Instructions that flush, without those of each erf, whose end LLVM marks."""
    erfs = len(re.findall(r"%__nv_erff\.exit", ptx))
    exempt = Counter({name: erfs * count for name, count in FLUSHED_BY_ERF.items()})
    return (Counter(re.findall(r"\b\S+\.ftz\S*", ptx)) - exempt).total()


def defects(launch: Launch, resources: Resources, capability: int) -> list[str]:
    """What is wrong with a compiled launch, in words; empty if nothing is.

    No kernel may spill or ask for more shared memory than a block has. None may flush small numbers to zero, since
    integer values are multiplied as such, or add floats atomically, since their order would be left to chance.
    A kernel that streams pages loads 16 bytes a thread, and one whose loops are to be pipelined copies asynchronously.
    """
    found = []
    if resources.stack:
        found.append(f"{resources.stack} bytes of registers spilled to the stack")
    limit = SHARED_MEMORY[capability] * 1024
    if resources.shared > limit:
        found.append(f"{resources.shared} bytes of shared memory, and a block has {limit}")
    if resources.flushing:
        found.append(f"{resources.flushing} instructions that flush small numbers to zero")
    if resources.float_atomics:
        found.append(f"{resources.float_atomics} atomic operations on floats")
    if launch.streams_pages and not resources.wide_loads:
        found.append("no 16-byte loads")
    if launch.pipelined and not resources.asynchronous:
        found.append("not pipelined")
    return found
