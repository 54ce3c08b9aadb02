"""A launch as data runs as a call of the kernel does."""

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


def launch(x, bias, factor, n):
    arguments = {"x_ptr": x, "bias_ptr": bias, "y_ptr": torch.empty_like(x), "factor": factor, "n": n}
    return Launch(_scale_kernel, (2,), arguments, {"BLOCK": 16})


@pytest.mark.parametrize("biased", [True, False])
def test_a_launch_runs(biased):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, bias = torch.randn(20, device=device), torch.randn(20, device=device)
    planned = launch(x, bias if biased else None, 2.0, 20)
    planned.run()
    torch.testing.assert_close(planned.arguments["y_ptr"], 2 * x + bias * biased)
