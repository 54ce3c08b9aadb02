"""The machine's speeds."""

import pytest
import torch

from cachemoe.benchmarks.speeds import device_copy_bandwidth, matmul_rate, pinned_copy_bandwidth


def test_the_cpus_matmul_rate_is_a_rate():
    assert matmul_rate(torch.device("cpu")) > 0


@pytest.mark.gpu
@pytest.mark.gpu_only("its speeds")
def test_the_gpus_speeds_are_rates():
    assert matmul_rate(torch.device("cuda")) > 0
    # Memory is faster than the link to it.
    assert device_copy_bandwidth(1 << 28) > pinned_copy_bandwidth(1 << 27) > 0
