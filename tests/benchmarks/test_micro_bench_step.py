"""Steps and reading through, as they are timed: as many misses as there should be, each time, and the right output."""

import pytest
import torch

from cachemoe.benchmarks import micro_bench_fetch, micro_bench_step, timing
from cachemoe.benchmarks.geometries import GEOMETRIES, Geometry
from cachemoe.benchmarks.micro_bench_step import MISSES, SCORES, STRATEGY, Steps, logits_of, wanted
from cachemoe.kernels.route import route
from cachemoe.kernels.state import Residency
from cachemoe.moe.strategies import policy_of
from cachemoe.offload.residency import least_recently_used

CUDA = torch.device("cuda")
TINY = Geometry("tiny", 64, 32, experts=4, top_k=2, layers=1)


@pytest.mark.parametrize("misses", MISSES)
def test_every_token_misses_as_often_as_it_should(misses):
    geometry = GEOMETRIES[micro_bench_step.GEOMETRY]
    ids = wanted(geometry.experts, geometry.top_k, misses)
    logits = logits_of(ids, geometry.experts).view(1, len(ids), -1)
    state = Residency.empty(torch.tensor([geometry.experts * 3 // 4]), geometry.experts)
    policy = policy_of(STRATEGY, top_k=geometry.top_k)
    for _ in range(2):
        routing = route(logits, state, least_recently_used, geometry.top_k, policy, SCORES)
        assert torch.equal(routing.ids[0].sort(-1).values, ids.sort(-1).values)
    assert routing.hits[0].logical_not().sum(-1).eq(misses).all()
    used = ids.unique()
    assert len(used) == geometry.experts // (1 if misses else 2)  # no cache holds what is used


@pytest.fixture
def small(monkeypatch):
    """One layer, and each call of a round once; without a GPU all is interpreted."""
    monkeypatch.setattr(micro_bench_step, "WORKING_SET", 1)
    monkeypatch.setattr(timing, "REPLAY_S", 1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("way", micro_bench_step.WAYS)
def test_a_replay_misses_as_often_and_computes_what_the_cpu_does(small, monkeypatch, way):
    outputs, step = [], micro_bench_step.step

    def noted(engine, x, layer, logits, policy, routing):
        y = step(engine, x, layer, logits, policy, routing)
        outputs.append((y, x, routing))
        return y

    monkeypatch.setattr(micro_bench_step, "step", noted)
    steps = Steps(TINY, "bf16", CUDA)
    timed, _ = steps.round(way, 1)
    captured = outputs[-timed.calls :]
    for y, _, routing in captured:
        y.fill_(float("nan"))
        routing.misses.count.zero_()
    timed.run()
    _, counts = steps.round(way, 1)
    assert counts.tolist() == [1, 1]
    for output in captured:
        steps._check(*output)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", micro_bench_fetch.WAYS)
def test_all_that_is_missing_is_read_through_or_fetched_before(small, monkeypatch, implementation):
    monkeypatch.setitem(GEOMETRIES, "tiny", TINY)
    measured = []

    def measure(subject, work, repetition, timed):
        measured.append((work.bytes, timed.calls))
        timed.run()

    def one_at_a_time(key, make):
        return make()

    # It checks the output and the slots before it measures.
    micro_bench_fetch.test_read_through(measure, CUDA, one_at_a_time, "tiny", "bf16", 0, implementation)
    assert measured == [(TINY.top_k * TINY.page_format("bf16").weight_bytes, micro_bench_fetch.CALLS)]
