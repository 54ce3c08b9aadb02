"""Prefetchers: what each predicts; and which pages are worth asking for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachemoe.kernels.route import route
from cachemoe.kernels.route_cpu import peek
from cachemoe.kernels.state import Residency
from cachemoe.moe.strategies import MaxRank, policy_of
from cachemoe.offload.prefetch import Frequency, NextLayerGate, Oracle, PreviousToken, lands_in_time
from cachemoe.offload.residency import least_recently_used

LAYERS, EXPERTS, HIDDEN = 4, 6, 8


def test_the_next_layers_gate_is_its_router_on_this_layers_input():
    routers = torch.randn(LAYERS, EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(0))
    prefetcher = NextLayerGate(routers, lambda layer, logits: [layer, *logits.topk(2).indices.tolist()], ahead=2)
    x = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(1))

    def expected(layer):
        return layer, [layer, *(routers[layer] @ x[0]).topk(2).indices.tolist()]

    assert prefetcher.predict(0, x) == [expected(1), expected(2)]
    assert prefetcher.predict(2, x) == [expected(3)]
    assert prefetcher.predict(3, x) == []  # of the next token nothing is known


def test_stacked_gates_stop_at_the_first_layer_that_lacks_an_expert():
    routers = torch.randn(LAYERS, EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(0))
    x, held = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(1)), set()

    def choose(layer, logits):
        return logits.topk(2).indices.tolist()

    prefetcher = NextLayerGate(routers, choose, 3, lambda layer, e: (layer, e) in held)
    wanted = [(layer, choose(layer, routers[layer] @ x[0])) for layer in range(1, LAYERS)]
    for count in range(1, len(wanted) + 1):
        assert prefetcher.predict(0, x) == wanted[:count]
        layer, experts = wanted[count - 1]
        held.add((layer, experts[0]))
        assert prefetcher.predict(0, x) == wanted[:count]  # one is there, and the other not
        held.add((layer, experts[1]))


def test_the_gate_predicts_with_the_biased_strategy():
    """A strategy that prefers residents predicts them too: exactly what the layer would choose of these logits."""
    states = Residency.empty(torch.full((LAYERS,), 3), EXPERTS)
    for layer in range(LAYERS):
        states.slot_of[layer, :3], states.page_of[layer] = torch.arange(3), torch.arange(3)
    policy = policy_of(MaxRank(EXPERTS, 0))
    routers = torch.randn(LAYERS, EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(0))
    prefetcher = NextLayerGate(routers, lambda layer, logits: peek(logits, states[layer : layer + 1], 2, policy))
    for seed in range(5):
        x = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(seed))
        ((layer, experts),) = prefetcher.predict(1, x)
        state = states[layer : layer + 1].clone()
        assert (
            experts
            == route((routers[2] @ x[0])[None, None], state, least_recently_used, 2, policy).ids.flatten().tolist()
        )
        assert max(experts) < 3


def test_the_previous_tokens_experts_wrap_to_the_next_token():
    prefetcher = PreviousToken(LAYERS, ahead=2)
    x = torch.zeros(1, HIDDEN)
    prefetcher.observe(0, [1, 2])
    assert prefetcher.predict(0, x) == [(1, []), (2, [])]
    prefetcher.observe(3, [5, 4])
    assert prefetcher.predict(3, x) == [(0, [1, 2]), (1, [])]
    assert prefetcher.predict(2, x) == [(3, [5, 4]), (0, [1, 2])]


def test_the_most_frequent_experts():
    state = Residency.empty(torch.full((LAYERS,), 3), EXPERTS)
    state.uses[1] = torch.tensor([0, 5, 1, 9, 2, 0])
    assert Frequency(lambda: state, 2).predict(0, torch.zeros(1, HIDDEN)) == [(1, [3, 1])]


@given(st.integers(1, 3), st.integers(1, 3 * LAYERS))
def test_the_oracle_knows_what_comes(ahead, calls):
    trace = torch.arange(3 * LAYERS * 2).view(3, LAYERS, 2)
    oracle, flat = Oracle(trace, ahead), trace.flatten(0, 1).tolist()
    for call in range(calls):
        oracle.observe(call % LAYERS, flat[call])
        predicted = oracle.predict(call % LAYERS, torch.zeros(1, HIDDEN))
        assert [experts for _, experts in predicted] == flat[call + 1 : call + 1 + ahead]
        assert [layer for layer, _ in predicted] == [(call + 1 + i) % LAYERS for i in range(len(predicted))]


@pytest.mark.parametrize(
    "queued, rate, latency, needed_in, expected",
    [
        (0, 100.0, 0.0, 1.0, True),  # 100 bytes at 100 a second, in time to the moment
        (0, 100.0, 0.01, 1.0, False),
        (1, 100.0, 0.0, 1.0, False),
        (100, 200.0, 0.0, 1.0, True),
        (0, 100.0, 0.0, -1.0, False),
    ],
)
def test_a_page_is_asked_for_if_it_lands_in_time(queued, rate, latency, needed_in, expected):
    assert lands_in_time(queued, 100, rate, latency, needed_in) is expected
