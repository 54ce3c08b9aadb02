"""The machine code of a compiled kernel's main loop: what a step of the stream of weights costs."""

import re
from typing import Any

from cachemoe.benchmarks.compile_ahead import told


def loop_step(compiled: Any) -> list[str]:
    """Names of the instructions, such as LDGSTS.E.128, of the longest loop that copies to shared memory.

    Args:
        compiled: what ``compile_launch`` gave, of a kernel that is pipelined.

    Raises:
        ValueError: if no loop copies.
    """
    labels, names, loops = {}, [], []
    for line in told(compiled, "nvdisasm", "-c").splitlines():
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
