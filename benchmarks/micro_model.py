"""What the experts of one token should take on an H100: a model, to hold a GPU's figures against.

It assumes that each of the two launches streams its weights once, as fast as memory or the instructions allow,
whichever is slower, and adds what a launch costs before and after. x and h are small, and left out. A figure far above
the model says that an assumption is wrong; which one, a profiler can say.
"""

from cachemoe.benchmarks.geometries import Geometry

MULTIPROCESSORS, CLOCK_HZ, LANES = 132, 1.755e9, 128
"""Of an H100 SXM under load; lanes are the threads of a multiprocessor that start an instruction in a cycle."""

GAP_S, FIRST_BYTES_S, TAIL_S = 1.1e-6, 1.4e-6, 0.6e-6
"""Of each launch: after the one before it in a CUDA graph, until its first bytes arrive, and while programs run out."""

OF_BANDWIDTH, OF_ISSUE = 0.95, 0.80
"""What streaming reaches of a large copy's bandwidth, and busy programs of the cycles in which they could issue."""

INSTRUCTIONS = {"bf16": (2.33, 2.36), "int8": (4.08, 4.11), "int4": (7.7, 8.2), "int2": (13.3, 14.6)}
"""A thread's for a byte of weights, of ``gate_up`` and ``down``: counted in the machine code, which a test repeats."""


def expected_seconds(geometry: Geometry, kind: str, memory: float) -> float:
    """Seconds of the experts of one token, all of them in the pool.

    Args:
        kind: page format, one of ``INSTRUCTIONS``.
        memory: bytes a second that a large copy within the GPU's memory reads and writes.
    """
    parts = geometry.page_format(kind).parts
    seconds = 0.0
    for matrix, instructions in zip(("gate_up", "down"), INSTRUCTIONS[kind], strict=True):
        size = geometry.top_k * sum(part for name, _, part, *_ in parts if name.startswith(matrix))
        reading = size / (memory * OF_BANDWIDTH)
        issuing = size * instructions / (MULTIPROCESSORS * LANES * CLOCK_HZ * OF_ISSUE)
        seconds += max(reading, issuing) + GAP_S + FIRST_BYTES_S + TAIL_S
    return seconds
