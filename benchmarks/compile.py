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
"""Bytes of shared memory that one block may use, by compute capability (CUDA C++ Programming Guide, table 27)."""


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses; the last three count instructions of its machine code.

    Args:
        registers: of a thread.
        shared: bytes of shared memory of a block.
        stack: bytes of stack of a thread.
        spilled: bytes of a thread's registers that went to local memory.
        wide_loads: global loads of 16 bytes a thread.
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
        options=launch.options(),
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
        wide_loads=len(re.findall(r"\bLDG\.E\.(?:\w+\.)*128\b", sass)),
        asynchronous=len(re.findall(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b", sass)),
        tensor_core=len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|IMMA)\b", sass)),
    )


def _cuobjdump(option: str, path: Path) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
