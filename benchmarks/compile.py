"""Compile launches ahead of time for a GPU that need not be there, and read from the result what each kernel uses."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cachemoe.kernels.launch import Launch

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one block may use, by compute capability (CUDA C++ Programming Guide)."""


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses; the last three count instructions of its machine code.

    Args:
        registers: of a thread.
        shared: bytes of shared memory of a block.
        stack: bytes of stack of a thread.
        spilled: bytes of a thread's registers that went to local memory.
        wide_loads: loads of 16 bytes a thread from global memory, into registers or shared memory.
        asynchronous: copies from global to shared memory that do not wait (cp.async, TMA).
        tensor_core: matrix instructions.
    """

    registers: int
    shared: int
    stack: int
    spilled: int
    wide_loads: int
    asynchronous: int
    tensor_core: int


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compile one launch for a compute capability such as 90.

    Raises:
        RuntimeError: if TRITON_INTERPRET is set: an interpreted kernel cannot be compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("unset TRITON_INTERPRET to compile kernels")
    types, constants, attributes = launch.signature()
    compiled = triton.compile(
        ASTSource(launch.kernel, types, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("-res-usage", path)
        sass = _cuobjdump("-sass", path)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(
        registers=found["REG"],
        shared=compiled.metadata.shared,
        stack=found["STACK"],
        spilled=found["LOCAL"],
        wide_loads=len(re.findall(r"\b(?:LDG|LDGSTS)\.E\.(?:\w+\.)*128\b", sass)),
        asynchronous=len(re.findall(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b", sass)),
        tensor_core=len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|IMMA)\b", sass)),
    )


def defects(launch: Launch, resources: Resources, capability: int) -> list[str]:
    """What is wrong with a compiled launch, in words; empty if nothing is.

    No kernel may spill or ask for more shared memory than a block has. A kernel that streams pages loads 16 bytes a
    thread, and one whose loops are to be pipelined copies asynchronously.
    """
    found = []
    if resources.spilled or resources.stack:
        found.append(f"{resources.spilled} bytes spilled, {resources.stack} bytes of stack")
    if resources.shared > SHARED_MEMORY[capability]:
        found.append(f"{resources.shared} bytes of shared memory, and a block has {SHARED_MEMORY[capability]}")
    if launch.streams_pages and not resources.wide_loads:
        found.append("no 16-byte loads")
    if launch.pipelined and not resources.asynchronous:
        found.append("not pipelined")
    return found


def _cuobjdump(option: str, path: Path) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
