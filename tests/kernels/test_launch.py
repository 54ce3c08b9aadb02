"""A launch's signature is what Triton would specialise it to."""

import pytest
import torch
import triton
import triton.language as tl

from cachemoe.kernels.launch import Launch

pytestmark = pytest.mark.kernel


@triton.jit
def _scale_kernel(x_ptr, bias_ptr, y_ptr, factor, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x_ptr + at, at < n) * factor
    if bias_ptr is not None:
        y += tl.load(bias_ptr + at, at < n)
    tl.store(y_ptr + at, y, at < n)


def launch(x, bias=None, factor=2.0, n=32):
    arguments = {"x_ptr": x, "bias_ptr": bias, "y_ptr": torch.empty_like(x), "factor": factor, "n": n}
    return Launch(_scale_kernel, (2,), arguments, {"BLOCK": 16})


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_types_constants_and_divisibility():
    types, constants, attributes = launch(meta(32, dtype=torch.bfloat16)[1:], n=32).signature()
    names = ("*bf16", "constexpr", "*bf16", "fp32", "i32", "constexpr")
    assert list(types.values()) == list(names)
    assert constants == {(1,): None, (5,): 16}
    # x begins 2 bytes into its memory; y and n are multiples of 16.
    assert attributes == {(2,): [["tt.divisibility", 16]], (4,): [["tt.divisibility", 16]]}


@pytest.mark.parametrize(
    "n, kind, divisible", [(1, "constexpr", False), (17, "i32", False), (2**31 - 16, "i32", True), (2**31, "i64", True)]
)
def test_integers(n, kind, divisible):
    types, constants, attributes = launch(meta(32), n=n).signature()
    assert types["n"] == kind
    assert ((4,) in constants, (4,) in attributes) == (n == 1, divisible)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float32])
def test_pointers(dtype):
    assert launch(meta(32, dtype=dtype)).signature()[0]["x_ptr"][0] == "*"


def test_a_launch_runs():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, bias = torch.randn(20, device=device), torch.randn(20, device=device)
    planned = launch(x, bias, n=20)
    planned.run()
    torch.testing.assert_close(planned.arguments["y_ptr"], 2 * x + bias)
