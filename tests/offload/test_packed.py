"""Small tensors that travel together."""

import pytest
import torch

from cachemoe.offload.packed import to_device, to_host

TENSORS = (
    torch.tensor([[[1, -(1 << 62)]]]),
    torch.tensor([[0.5, float("nan")]]),
    torch.arange(12, dtype=torch.float32).view(3, 4).T,
    torch.empty(0, 3, dtype=torch.bfloat16),
    torch.tensor([True, False, True]),
)


def test_on_the_host_nothing_is_copied():
    for travel in (lambda *tensors: to_device(torch.device("cpu"), *tensors), to_host):
        assert all(a is b for a, b in zip(travel(*TENSORS), TENSORS, strict=True))


@pytest.mark.gpu
def test_what_went_to_a_gpu_and_back_is_the_same():
    there = to_device(torch.device("cuda"), *TENSORS)
    assert all(tensor.is_cuda for tensor in there)
    for before, after in zip(TENSORS, to_host(*there), strict=True):
        assert (after.device.type, after.dtype, after.shape) == ("cpu", before.dtype, before.shape)
        assert torch.equal(after.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.gpu
def test_what_is_on_another_gpu_comes_too():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    device = torch.device("cuda", 1)
    mixed = torch.tensor([1, 2], device="cuda:0"), torch.tensor([3]), torch.tensor([4], device=device)
    there = to_device(device, *mixed)
    assert there[2] is mixed[2]
    assert [(each.device, each.tolist()) for each in there] == [(device, [1, 2]), (device, [3]), (device, [4])]
