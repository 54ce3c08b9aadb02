"""latency-ratio against its rule in plain Python."""

import math

import pytest
import torch
from literal import RULES, assert_same, assert_weighs, best_first, empty, logits_of, routed, rules, scores_of

from cachemoe.offload.errors import InputError

EXPERTS, TOKENS, CAPACITY = 12, 80, 5
by_logits = pytest.mark.parametrize("name", ["softmax", "renormalised"])


def assert_routes_as_the_model(text, rule, logits, k, top_j, **options):
    theirs, state = empty(CAPACITY, EXPERTS), empty(CAPACITY, EXPERTS)
    expected = routed("original", rule, logits, k, state=theirs)
    assert_same(routed(text, rule, logits, k, state=state, top_j=top_j, **options), expected)
    assert torch.equal(state.slot_of, theirs.slot_of)


@by_logits
@pytest.mark.parametrize("top_j", [0, 2])
def test_gamma_of_0_is_the_model_bit_for_bit(name, top_j):
    rule, logits = rules(EXPERTS)[name], logits_of(1, TOKENS, EXPERTS)
    assert_routes_as_the_model("latency-ratio:0", rule, logits, 3, top_j, miss_cost=2.0)


@by_logits
@pytest.mark.parametrize("top_j", [0, 2])
def test_equal_costs_change_nothing(name, top_j):
    rule, logits = rules(EXPERTS)[name], logits_of(1, TOKENS, EXPERTS)
    assert_routes_as_the_model("latency-ratio:1", rule, logits, 3, top_j, miss_cost=0.0)


@pytest.mark.parametrize("name", ["softmax", "renormalised"])
@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_j", [0, 1, 2])
def test_experts_come_by_weight_over_latency_to_the_gamma(name, gamma, top_j):
    """An absent expert takes five times as long as a resident one."""
    rule, logits, k, times = rules(EXPERTS)[name], logits_of(1, TOKENS, EXPERTS), 3, 5.0
    state, changed = empty(CAPACITY, EXPERTS), 0
    for t, z in enumerate(logits.tolist()):
        latency = [1.0 if slot >= 0 else times for slot in state.slot_of[0].tolist()]
        options = {"state": state, "top_j": top_j, "miss_cost": math.log(times)}
        routing = routed(f"latency-ratio:{gamma}", rule, logits[t : t + 1], k, **options)
        scores, ranked = scores_of(z, rule), best_first(z, rule)
        worth = [scores[e] / latency[e] ** gamma for e in range(EXPERTS)]
        wanted = sorted(ranked[top_j:], key=lambda e: -worth[e])
        chosen = (ranked[:top_j] + wanted)[:k]
        last, next_one = worth[wanted[k - top_j - 1]], worth[wanted[k - top_j]]
        assert abs(last / next_one - 1) > 1e-5  # of these logits none is on the edge
        assert routing.ids[0, 0].tolist() == sorted(chosen, key=ranked.index)
        assert_weighs(routing, 0, z, rule)
        changed += set(chosen) != set(ranked[:k])
    assert changed > TOKENS / 10


def test_a_large_gamma_takes_residents_alone():
    rule, logits, state = rules(EXPERTS)["softmax"], logits_of(1, TOKENS, EXPERTS), empty(CAPACITY, EXPERTS)
    routed("original", rule, logits_of(2, 20, EXPERTS), 3, state=state)
    routing = routed("latency-ratio:100", rule, logits, 3, state=state, top_j=0, miss_cost=2.0)
    assert routing.hits.all()


@pytest.mark.parametrize("name", sorted(set(RULES).difference(("softmax", "renormalised"))))
def test_values_that_are_no_logarithms_of_weights_are_refused(name):
    rule, logits = rules(EXPERTS)[name], logits_of(1, 2, EXPERTS)
    with pytest.raises(InputError, match="selects by more than its logits, which latency-ratio would leave out"):
        routed("latency-ratio:1", rule, logits, 3, state=empty(CAPACITY, EXPERTS))
