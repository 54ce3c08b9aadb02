"""relu-route and relu-literal against their rules in plain Python."""

from functools import partial

import pytest
import torch
from literal import NEAR, RULES, assert_weighs, best_first, calibration_of, logits_of, ran, routed, rules, values_of

from cachemoe.kernels.state import GateScores
from cachemoe.moe.policies.relu_route import most_places
from cachemoe.moe.routers import RoutingRule, own_choice, sparsemixer_weights
from cachemoe.moe.strategies import Strategy
from cachemoe.offload.errors import InputError

TOKENS = 300
each_rule = pytest.mark.parametrize("name", RULES)
each_size = pytest.mark.parametrize(("experts", "k"), [(8, 2), (16, 4), (40, 10), (6, 4), (8, 1)])


@each_rule
@each_size
def test_on_the_calibration_text_tokens_have_k_experts_on_average(name, experts, k):
    rule, logits = rules(experts)[name], logits_of(1, TOKENS, experts)
    routing = routed("relu-route", rule, logits, k, calibration_of(rule, logits, k))
    counts = (routing.slots[0] >= 0).sum(1)
    assert float(counts.float().mean()) == pytest.approx(k, rel=0.01)
    assert counts.min() >= 1 and counts.max() <= min(2 * k, experts, 16)
    assert k == 1 or counts.float().var() > 0


@each_rule
@each_size
def test_those_above_the_threshold_run_and_the_best_in_any_case(name, experts, k):
    rule, logits = rules(experts)[name], logits_of(1, TOKENS, experts)
    known = calibration_of(rule, logits, k)
    new = torch.cat((logits_of(2, 40, experts), logits_of(3, 40, experts) - 4))
    routing = routed("relu-route", rule, new, k, known)
    bound = known.thresholds.item()
    for t, z in enumerate(new.tolist()):
        values = values_of(z, rule)
        order = best_first(z, rule)[: min(2 * k, experts, 16)]
        expected = [e for e in order if values[e] > bound] or order[:1]
        assert ran(routing, t) == expected or any(abs(value - bound) < NEAR for value in values)
        assert_weighs(routing, t, z, rule)


def test_a_token_takes_twice_k_at_most_and_no_more_than_there_are_or_the_kernel_takes():
    assert [most_places(None, k, experts) for k, experts in ((2, 8), (4, 6), (1, 60), (10, 64), (16, 64), (8, 8))] == [
        4,
        6,
        2,
        16,
        16,
        8,
    ]
    assert Strategy("relu-route").places(60, 4) == 8 and Strategy("original").places(60, 4) == 4


@pytest.mark.parametrize("group_score", ["best", "best-two"])
def test_groups_that_leave_fewer_than_twice_k_to_choose_from(group_score):
    """Two of four groups of two experts: four candidates for K = 3."""
    scores = GateScores("sigmoid", 4, 2, group_score, renormalise=True, epsilon=1e-20)
    rule, logits = RoutingRule(scores, logits_of(4, 8) / 10), logits_of(1, TOKENS, 8)
    routing = routed("relu-route", rule, logits, 3, calibration_of(rule, logits, 3))
    counts = (routing.slots[0] >= 0).sum(1)
    assert float(counts.float().mean()) == pytest.approx(3, rel=0.01)
    assert counts.min() >= 1 and counts.max() == 4


@pytest.mark.parametrize("scores", [GateScores(), GateScores(renormalise=True, scale=2.5)])
@pytest.mark.parametrize(("experts", "k"), [(8, 2), (16, 4)])
def test_literal_weights_are_what_is_left_of_the_logits(scores, experts, k):
    rule, logits = RoutingRule(scores), logits_of(1, TOKENS, experts)
    known = calibration_of(rule, logits, k)
    routing = routed("relu-literal", rule, logits, k, known)
    bound = known.thresholds.item()
    for t, z in enumerate(logits.tolist()):
        order = best_first(z, rule)[: 2 * k]
        expected = [e for e in order if max(z[e] - bound, 0) > 0] or order[:1]
        assert ran(routing, t) == expected or any(0 < abs(x - bound) < NEAR for x in z)
        kept = routing.slots[0, t] >= 0
        left = torch.tensor([max(z[e] - bound, 0.0) for e in ran(routing, t)])
        torch.testing.assert_close(routing.weights[0, t][kept], left, rtol=1e-5, atol=1e-6)
        assert not routing.weights[0, t][~kept].any()
    counts = (routing.slots[0] >= 0).sum(1)
    assert float(counts.float().mean()) == pytest.approx(k, rel=0.01)
    assert not torch.allclose(routing.weights.sum(-1), torch.tensor(1.0)) and routing.weights.max() > 1


def test_literal_of_a_token_with_nothing_above_the_threshold_is_the_best_with_weight_0():
    rule, logits = rules(8)["softmax"], logits_of(1, TOKENS, 8)
    low = logits[:5] - 100
    routing = routed("relu-literal", rule, low, 2, calibration_of(rule, logits, 2))
    assert [ran(routing, t) for t in range(5)] == [[best_first(z, rule)[0]] for z in low.tolist()]
    assert not routing.weights.any()


def test_literal_is_refused_where_more_than_logits_select():
    logits = logits_of(1, TOKENS, 8)
    with_correction = rules(8)["sigmoid with a correction"]
    sparsemixer = RoutingRule(GateScores(), weigh=partial(sparsemixer_weights, jitter=0.01))
    for rule in (with_correction, sparsemixer):
        with pytest.raises(InputError, match="selects by more than its logits") as caught:
            routed("relu-literal", rule, logits, 2, calibration_of(rule, logits, 2))
        assert "\n" not in str(caught.value)


def test_without_a_calibration_both_are_refused_in_a_sentence():
    for text in ("relu-route", "relu-literal"):
        with pytest.raises(InputError, match=f"{text} needs a calibration of the model: make one with") as caught:
            routed(text, rules(8)["softmax"], logits_of(1, 3, 8), 2)
        assert "\n" not in str(caught.value)


def test_the_weights_of_k_that_run_are_those_of_the_model():
    """A token of which exactly K lie above the threshold is routed as the model routes it."""
    rule, logits = rules(8)["renormalised"], logits_of(1, TOKENS, 8)
    routing = routed("relu-route", rule, logits, 2, calibration_of(rule, logits, 2))
    ids, weights = own_choice(rule, logits, 2)
    two = (routing.slots[0] >= 0).sum(1) == 2
    assert two.any()
    assert torch.equal(routing.ids[0, two, :2], ids[two])
    torch.testing.assert_close(routing.weights[0, two, :2], weights[two])
