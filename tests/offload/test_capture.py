"""Captures: on any device, and what is left after one that fails."""

import gc

import pytest
import torch

from cachemoe.offload.capture import captured

pytestmark = pytest.mark.gpu


def test_a_capture_that_fails_says_why_and_leaves_nothing_behind():
    x, before = torch.ones(3, device="cuda"), torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="captur") as raised, captured(torch.cuda.CUDAGraph()):
        torch.cuda.synchronize()
    assert "previous error" not in str(raised.value)  # which is all that the end of the capture says
    assert torch.cuda.current_stream() == before
    assert gc.isenabled()
    graph = torch.cuda.CUDAGraph()
    with captured(graph):
        x += 1
    graph.replay()
    assert x.tolist() == [2.0] * 3


def test_what_python_raises_goes_through():
    before = torch.cuda.current_stream()
    with pytest.raises(KeyError), captured(torch.cuda.CUDAGraph()):
        raise KeyError
    assert torch.cuda.current_stream() == before


def test_numbers_become_tensors_within():
    """As transformers' masks for eager attention, each step: no copy from the host."""
    mask, graph = torch.tensor([True, False], device="cuda"), torch.cuda.CUDAGraph()
    with captured(graph):
        made = torch.where(mask, torch.tensor(0.5, device=mask.device, dtype=torch.float16), -1.0)
        count = torch.tensor(3, device="cuda")
    graph.replay()
    assert made.dtype == torch.float16 and made.tolist() == [0.5, -1.0]
    assert count.dtype == torch.int64 and count.item() == 3


def test_no_garbage_is_collected_within():
    with captured(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")  # CUDA warns of a graph of nothing
        assert not gc.isenabled()
    assert gc.isenabled()


def test_the_device_need_not_be_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors, graphs = [torch.zeros(2, device=f"cuda:{index}") for index in range(2)], []
    for x in tensors:
        graphs.append(torch.cuda.CUDAGraph())
        with captured(graphs[-1], x.device):
            x += 1
        assert torch.cuda.current_device() == 0
    for graph, x, count in zip(graphs, tensors, (2, 3), strict=True):
        for _ in range(count):
            graph.replay()
        torch.cuda.synchronize(x.device)
        assert x.tolist() == [count] * 2
