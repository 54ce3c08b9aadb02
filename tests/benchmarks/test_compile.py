"""Every kernel configuration compiles for GPUs that are not there, without spills, with the loads that it claims."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from typer.testing import CliRunner

from cachemoe.benchmarks import compile_run
from cachemoe.benchmarks.cli import app
from cachemoe.benchmarks.compile_ahead import SHARED_MEMORY, Resources, compile_launch, defects
from cachemoe.benchmarks.compile_cases import cases
from cachemoe.benchmarks.compile_run import wrong
from cachemoe.kernels.launch import Launch

FINE = Resources(
    registers=64, shared=1024, stack=0, wide_loads=4, asynchronous=3, tensor_core=0, flushing=0, float_atomics=0
)  # of a kernel that streams pages in a pipeline


@pytest.mark.parametrize("capability", [80, 90])
def test_every_configuration(capability, tmp_path, capsys):
    # A process of its own: kernels defined under TRITON_INTERPRET cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "cachemoe.benchmarks.cli", "compile", "--capability", str(capability)]
    result = subprocess.run(
        [*command, "--json", str(tmp_path / "report.json")],
        env=environment | {"COLUMNS": "150"},
        capture_output=True,
        text=True,
        check=False,
    )
    with capsys.disabled():
        print("\n" + result.stdout)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    kernels = {launch.kernel.__name__ for _, launch in cases()}
    assert {f"_{row['kernel']}_kernel" for row in rows} == kernels and len(rows) > 300
    assert not [row for row in rows if row["defects"] or row["stack"]]


SAME_KEY = """
import torch
from cachemoe.benchmarks.compile_ahead import compile_launch
from cachemoe.kernels.experts_decode import plan_decode
from cachemoe.kernels.formats import PageFormat

def keys(device):
    page_format = PageFormat("int4", 64, 64, 32, bias=True)
    pool = torch.zeros(3, page_format.page_bytes, dtype=torch.uint8, device=device)
    x, h = torch.zeros(1, 64, device=device).bfloat16(), torch.zeros(2, 64, device=device).bfloat16()
    slots, gates = torch.zeros(1, 2, dtype=torch.int64, device=device), torch.zeros(1, 2, device=device)
    pending, partial = torch.zeros(1, 2, dtype=torch.bool, device=device), torch.zeros(1, 2, 64, device=device)
    weights = page_format.views(pool)
    launches = plan_decode(x, slots, gates, weights, page_format, x, h, pending, partial, finish=False)
    return [compile_launch(launch, 90).hash for launch in launches]

assert keys("meta") == keys("cpu")
"""


def test_a_launch_without_memory_is_compiled_as_one_with_it():
    # Triton's cache finds by this key what was compiled ahead of time.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", SAME_KEY], env=environment, check=True)


def test_trials_may_have_defects():
    rows = [{"trial": trial, "defects": found} for trial in (True, False) for found in ([], ["spilled"])]
    assert wrong({"rows": rows}) == [{"trial": False, "defects": ["spilled"]}]


class CutOff:
    """A pool of processes that is interrupted after one compilation."""

    def __init__(self, workers, context): ...

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    def shutdown(self, wait, cancel_futures): ...

    def map(self, function, jobs):
        yield "key", ROW
        raise KeyboardInterrupt


ROW = asdict(FINE) | {"kernel": "fetch", "for": "any page", "trial": False, "capability": 80, "defects": []}


def test_what_was_compiled_before_an_interrupt_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_run, "ProcessPoolExecutor", CutOff)
    result = CliRunner().invoke(app, ["compile", "--capability", "80", "--json", str(tmp_path / "report.json")])
    assert result.exit_code == 130 and "in part" in result.stdout and "interrupted" in result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["interrupted"] and report["rows"] == [ROW]


def test_the_cases_cover_every_path_and_format():
    names = [what for what, _ in cases()]
    for part in (
        "bf16",
        "fp16",
        "int8",
        "int4 32",
        "int4 64",
        "int4 128",
        "int2 32",
        "int2 64",
        "int2 128",
        "hits first",
        "misses later",
        "read through",
        "gelu",
        "relu",
    ):
        assert any(part in name for name in names), part
    assert {launch.constants.get("BLOCK_M") for _, launch in cases()} >= {16, 32, 64}


@pytest.mark.parametrize(
    "changes, claims, word",
    [
        ({"stack": 16}, {}, "spilled"),
        ({"shared": 1024 * SHARED_MEMORY[80] + 1}, {}, "shared memory"),
        ({"flushing": 1}, {}, "flush"),
        ({"float_atomics": 1}, {}, "atomic"),
        ({"wide_loads": 0}, {"streams_pages": True}, "16-byte"),
        ({"asynchronous": 0}, {"pipelined": True}, "pipelined"),
    ],
)
def test_what_is_wrong_is_said(changes, claims, word):
    launch = replace(Launch(None, (1,), {}), **claims)
    assert defects(launch, FINE, 80) == []
    (defect,) = defects(launch, replace(FINE, **changes), 80)
    assert word in defect


UNSOUND = """
import torch, triton
import triton.language as tl
from cachemoe.benchmarks.compile_ahead import compile_launch, read_resources
from cachemoe.kernels.launch import Launch

@triton.jit
def flushing(x_ptr):
    x = tl.load(x_ptr)
    tl.store(x_ptr, tl.inline_asm_elementwise("add.ftz.f32 $0, $1, $1;", "=f,f", [x], tl.float32, True, 1))

@triton.jit
def erf_and_flushing(x_ptr):
    x = tl.erf(tl.load(x_ptr))
    tl.store(x_ptr, tl.inline_asm_elementwise("abs.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1))

@triton.jit
def adding(x_ptr):
    tl.atomic_add(x_ptr, 1)

float32 = [(kernel, "float32") for kernel in (flushing, erf_and_flushing)]
for kernel, dtype in (*float32, (adding, "float32"), (adding, "float16"), (adding, "int32")):
    x = torch.empty(1, dtype=getattr(torch, dtype), device="meta")
    found = read_resources(compile_launch(Launch(kernel, (1,), {"x_ptr": x}), 90))
    print(kernel.__name__, dtype, found.flushing, found.float_atomics)
"""


def test_flushing_and_atomics_are_found(tmp_path):
    (tmp_path / "unsound.py").write_text(UNSOUND)  # Triton reads its kernels' source from a file
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, tmp_path / "unsound.py"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        "flushing float32 1 0",
        "erf_and_flushing float32 1 0",
        "adding float32 0 1",
        "adding float16 0 1",
        "adding int32 0 0",
    ]


def test_no_claim_no_defect():
    assert defects(Launch(None, (1,), {}), replace(FINE, wide_loads=0, asynchronous=0), 80) == []


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="on a GPU kernels are not interpreted")
def test_an_interpreted_kernel_is_not_compiled():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_launch(next(launch for _, launch in cases()), 90)
