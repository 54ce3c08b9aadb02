"""The machine code of a compiled kernel's main loop: what a step of the stream of weights costs."""

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton


def loop_step(compiled: Any) -> list[str]:
    """Names of the instructions, such as LDGSTS.E.128, of the longest loop that copies to shared memory.

    Args:
        compiled: what ``compile_launch`` gave, of a kernel that is pipelined.

    Raises:
        ValueError: if no loop copies.
    """
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        code = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout
    labels, names, loops = {}, [], []
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+ )?([\w.]+)(.*)", line):
            names.append(instruction[1])
            target = re.search(r"`\((\.L_x_\d+)\)", instruction[2])
            if instruction[1] == "BRA" and target and target[1] in labels:  # a branch back
                loops.append(names[labels[target[1]] :])
    copying = [loop for loop in loops if any(name.startswith("LDGSTS") for name in loop)]
    if not copying:
        raise ValueError("no loop copies to shared memory")
    return max(copying, key=len)
