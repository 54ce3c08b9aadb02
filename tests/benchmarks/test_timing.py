"""Rounds: what the clock surrounds on a CPU and on a GPU."""

import pytest
import torch

from cachemoe.benchmarks import timing
from cachemoe.benchmarks.timing import plan_round

CUDA = torch.device("cuda")


@pytest.fixture
def made():
    return []


@pytest.fixture
def calls(made):
    return [lambda name=name: made.append(name) for name in "abc"]


def test_on_a_cpu_a_round_is_one_call_and_calls_take_turns(made, calls):
    planned = plan_round(calls, torch.device("cpu"), capturable=True)
    made.clear()
    for _ in range(4):
        planned.run()
    assert planned.calls == 1
    assert made == ["a", "b", "c", "a"]


@pytest.mark.parametrize(
    ("seconds", "repeats"), [(timing.REPLAY_S, 1), (timing.REPLAY_S / 3, 1), (timing.REPLAY_S / 7, 3)]
)
def test_a_graph_holds_whole_rotations_and_lasts_long_enough(monkeypatch, calls, seconds, repeats):
    captured = []
    monkeypatch.setattr(timing, "_seconds", lambda call: seconds)
    monkeypatch.setattr(timing, "_capture", lambda calls, count: captured.append(count))
    planned = plan_round(calls, CUDA, capturable=True)
    assert captured == [planned.calls] == [3 * repeats]
    assert planned.timing == "CUDA graph"


def test_what_waits_for_the_gpu_is_queued_and_says_so(monkeypatch, made, calls):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: made.append("end"))
    planned = plan_round(calls, CUDA, capturable=False)
    made.clear()
    planned.run()
    assert (planned.calls, planned.timing) == (3, "queued")
    assert made == ["a", "b", "c", "end"]


@pytest.mark.gpu
def test_a_replay_makes_every_call_once():
    counts = torch.zeros(3, device=CUDA)
    planned = plan_round([lambda i=i: counts[i].add_(1) for i in range(3)], CUDA, capturable=True)
    counts.zero_()
    planned.run()
    assert counts.tolist() == [planned.calls / 3] * 3
