"""The model of one token's experts: the machine code has the instructions that it counts, and it gives what it gave."""

import json
import os
import subprocess
import sys

import pytest

from cachemoe.benchmarks.geometries import GEOMETRIES
from cachemoe.benchmarks.micro_model import INSTRUCTIONS, expected_seconds

COUNT = """
import json, sys
from cachemoe.benchmarks.compile_ahead import compile_launch
from cachemoe.benchmarks.compile_loop import loop_step
from cachemoe.benchmarks.tiles import meta_launches

def counts(launch):
    step, tile = loop_step(compile_launch(launch, 90)), launch.constants
    elements = tile["BLOCK_N"] * tile["BLOCK_K"] * tile.get("PADDED_K", 2)  # rows of gate and up, or of K experts
    size = elements * launch.arguments["weight_ptr"].element_size() / (32 * launch.num_warps)
    return len(step) / size, sum("I2F" in name for name in step)

print(json.dumps({kind: [*map(counts, meta_launches("qwen3-30b-a3b", kind).values())] for kind in sys.argv[1:]}))
"""


@pytest.fixture(scope="module")
def counted():
    """By format, for both launches: instructions of a loop step for a byte of weights, and conversions in the step."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COUNT, *INSTRUCTIONS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.mark.parametrize("kind", INSTRUCTIONS)
def test_the_instructions_are_the_machine_codes(counted, kind):
    assert [count for count, _ in counted[kind]] == pytest.approx(INSTRUCTIONS[kind], rel=0.1)


@pytest.mark.parametrize("kind", INSTRUCTIONS)
def test_no_value_is_converted_by_itself(counted, kind):
    assert [conversions for _, conversions in counted[kind]] == [0, 0]


@pytest.mark.parametrize(("kind", "percent"), [("bf16", 77), ("int8", 65), ("int4", 52), ("int2", 30)])
def test_what_it_expects_of_qwen3(kind, percent):
    geometry, memory = GEOMETRIES["qwen3-30b-a3b"], 3.0e12
    least = geometry.top_k * geometry.page_format(kind).weight_bytes / memory
    assert 100 * least / expected_seconds(geometry, kind, memory) == pytest.approx(percent, abs=0.5)


@pytest.mark.parametrize("kind", INSTRUCTIONS)
def test_a_slower_memory_takes_longer_and_nothing_beats_it(kind):
    for geometry in GEOMETRIES.values():
        slow, fast = (expected_seconds(geometry, kind, memory) for memory in (1e12, 1e13))
        assert slow > fast > geometry.top_k * geometry.page_format(kind).weight_bytes / 1e13
