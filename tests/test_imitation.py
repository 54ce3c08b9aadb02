"""The imitated GPU itself: what it refuses, what it puts off, what a replay does; and nothing of it stays behind."""

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from imitation import imitated_gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
CPU = torch.ones(3)


@triton.jit
def add_kernel(x_ptr, number, SIZE: tl.constexpr):
    at = x_ptr + tl.arange(0, SIZE)
    tl.store(at, tl.load(at) + number)


@pytest.fixture
def machine():
    with imitated_gpu() as machine:
        yield machine


def replaced():
    """Whatever the imitation might replace."""
    return [dict(vars(owner)) for owner in (torch, torch.cuda, torch.Tensor, torch.__future__, F)]


def test_nothing_of_it_stays_behind():
    with imitated_gpu():  # what torch itself loads and remembers at its first use
        torch.ones(1, device="cuda")
    before, run = replaced(), add_kernel.run
    with pytest.raises(ZeroDivisionError), imitated_gpu():
        assert torch.cuda.is_available() and torch.ones(1, device="cuda").is_cuda
        assert replaced() != before
        raise ZeroDivisionError
    for then, now in zip(before, replaced(), strict=True):
        assert then == now
    assert add_kernel.run == run
    assert not torch.__future__.get_overwrite_module_params_on_conversion()
    assert not torch.cuda.is_available()
    for made in (lambda: torch.ones(1, device="cuda"), lambda: CPU.to("cuda"), CPU.cuda):
        with pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
            made()
    with torch.device("meta"):
        assert torch.zeros(2).is_meta and torch.empty(2).is_meta


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_tensors_say_cuda_and_compute_what_the_cpu_computes(machine, mode):
    with mode():
        layer = torch.nn.Linear(3, 2)
        expected = layer(CPU).softmax(0)
        y = layer.cuda()(CPU.cuda()).softmax(0)
    assert y.is_cuda and y.device == torch.device("cuda", 0) and layer.weight.is_cuda
    assert torch.equal(y.cpu(), expected)


@pytest.mark.parametrize(
    "operation",
    [
        lambda: CPU + CPU.cuda(),
        lambda: CPU.to("cuda:1") + CPU.cuda(),
        lambda: torch.cat([CPU.cuda(), CPU]),
        lambda: CPU[torch.tensor([0], device="cuda")],
        lambda: add_kernel[(1,)](CPU, 1.0, SIZE=1),
        lambda: add_kernel[(1,)](CPU.to("cuda:1"), 1.0, SIZE=1),
        lambda: CPU.cuda().numpy(),
        lambda: CPU.cuda().long()[None] @ CPU.cuda().long()[:, None],
    ],
)
def test_what_a_gpu_refuses_is_refused(machine, operation):
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        operation()


def test_what_a_gpu_allows_is_allowed(machine):
    assert (CPU.cuda() + torch.tensor(2.0)).tolist() == [3.0] * 3  # a number, wherever it is
    assert CPU.cuda()[torch.tensor([0])].tolist() == [1.0]
    pinned = torch.zeros(4).pin_memory()
    add_kernel[(1,)](pinned, 1.0, SIZE=4)
    assert pinned.tolist() == [1.0] * 4


def test_a_default_device_counts(machine):
    """transformers asks with ``torch.tensor([])`` whether it makes a model without memory, and fills none then."""
    for device in ("meta", "cpu", "cuda"):
        with torch.device(device):
            assert torch.tensor([]).device.type == torch.zeros(1).device.type == device
    assert torch.tensor([1.0]).device.type == "cpu"


def test_memory_is_pinned_until_it_is_released(machine):
    page, cudart = torch.zeros(8), torch.cuda.cudart()
    assert not page.is_pinned()
    assert cudart.cudaHostRegister(page.data_ptr(), 16, 0) == 0
    assert cudart.cudaHostRegister(page.data_ptr() + 8, 16, 0) != 0  # in part already
    assert page.is_pinned() and page[3:].is_pinned() and not page[4:].is_pinned()
    assert cudart.cudaHostUnregister(page.data_ptr()) == 0
    assert not page.is_pinned()
    assert torch.zeros(2, pin_memory=True).is_pinned() and not torch.zeros(2).is_pinned()


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: bool(x[0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x[torch.tensor([0])],
        lambda x: x.copy_(CPU),
        lambda x: x.__setitem__(0, 2.0),  # one element alone is copied from the host
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.Event().synchronize(),
    ],
)
def test_host_waits_are_noted_with_their_place_and_refused_in_a_capture(machine, waiting):
    x = torch.ones(3, device="cuda")
    machine.waits.clear()
    waiting(x)
    assert machine.waits and "tests/test_imitation.py:" in machine.waits[0]
    noted = len(machine.waits)
    with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        waiting(x)
    assert len(machine.waits) <= noted + 1  # entering the capture


def test_what_does_not_wait_is_not_noted(machine):
    x, pinned = torch.ones(3, device="cuda"), CPU.pin_memory()
    machine.waits.clear()
    x[1:] = 2.0
    x.copy_(pinned, non_blocking=True)
    y = torch.where(x > 0, x, 0) * 2 + torch.arange(3, device="cuda")
    torch.cuda.Event().record()
    assert not machine.waits
    assert y.tolist() == [2.0, 3.0, 4.0]


def test_a_replay_does_what_was_captured_with_the_numbers_of_then(machine):
    x, total, factor, graph = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda"), 2, torch.cuda.CUDAGraph()
    scalar = torch.tensor(1.0)
    with torch.cuda.graph(graph):
        y = x * factor + scalar
        add_kernel[(1,)](y, 10.0, SIZE=4)
        total += y
    assert total.tolist() == [0.0] * 4  # nothing has run
    factor, _ = 5, scalar.fill_(100.0)
    graph.replay()
    assert total.tolist() == [13.0] * 4
    x.fill_(2.0)
    graph.replay()
    assert total.tolist() == [28.0] * 4


def test_another_stream_works_only_when_it_is_waited_for(machine):
    x, stream, page = torch.zeros(3, device="cuda"), torch.cuda.Stream(), CPU.pin_memory()
    with torch.cuda.stream(stream):
        x.copy_(page, non_blocking=True)
        done = stream.record_event(torch.cuda.Event(enable_timing=True))
        x += 1
    assert x.tolist() == [0.0] * 3  # whoever does not wait reads what was there before
    assert not done.query() and not stream.query()
    torch.cuda.current_stream().wait_event(done)
    assert x.tolist() == [1.0] * 3 and done.query()
    stream.synchronize()
    assert x.tolist() == [2.0] * 3 and stream.query()


def test_streams_wait_for_one_another_in_turn(machine):
    x, streams = torch.zeros(1, device="cuda"), [torch.cuda.Stream() for _ in range(3)]
    for number, stream in enumerate(streams):
        if number:
            stream.wait_stream(streams[number - 1])
        with torch.cuda.stream(stream):
            x.mul_(10).add_(number + 1)
    torch.cuda.current_stream().wait_stream(streams[-1])
    assert x.item() == 123


def test_what_a_kernel_has_not_written_is_nan(machine):
    assert torch.empty(3, device="cuda").isnan().all().item()


def test_events_are_of_a_device_and_need_time(machine):
    here, there = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with pytest.raises(ValueError, match="recorded"):
        here.elapsed_time(there)
    here.record()
    with torch.cuda.device(1):
        there.record()
    assert there.device == torch.device("cuda", 1)
    with pytest.raises(RuntimeError, match="invalid resource handle"):
        here.elapsed_time(there)
    with pytest.raises(ValueError, match="enable_timing"):
        here.elapsed_time(torch.cuda.Event())
