"""What drops or swaps by chance: as often as it says, never the best, the same each time."""

import pytest
import torch
from literal import RULES, assert_same, assert_weighs, best_first, empty, logits_of, ran, routed, rules

EXPERTS, TOKENS, K = 16, 1500, 4
each_rule = pytest.mark.parametrize("name", RULES)


def rate_of(rule, logits, routing, first):
    """The share of the model's own choice from a place on that does not run."""
    absent = 0
    for t, z in enumerate(logits.tolist()):
        own, here = best_first(z, rule)[:K], ran(routing, t)
        assert here[:first] == own[:first]
        absent += len(set(own) - set(here))
    return absent / (len(logits) * (K - first))


@each_rule
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_random_drop_drops_as_often_as_it_says_and_never_the_best(name, p):
    rule, logits = rules(EXPERTS)[name], logits_of(1, TOKENS, EXPERTS)
    routing = routed(f"random-drop:{p}", rule, logits, K)
    assert routing.ids[0].tolist() == [best_first(z, rule)[:K] for z in logits.tolist()]
    assert rate_of(rule, logits, routing, 1) == pytest.approx(p, abs=0.025)
    for t in range(50):
        assert_weighs(routing, t, logits[t].tolist(), rule)


@each_rule
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("top_j", [0, 1, 2])
def test_random_swap_swaps_as_often_as_it_says_and_never_the_j_best(name, p, top_j):
    rule, logits = rules(EXPERTS)[name], logits_of(1, TOKENS, EXPERTS)
    routing = routed(f"random-swap:{p}", rule, logits, K, top_j=top_j)
    assert (routing.slots >= 0).all()
    assert rate_of(rule, logits, routing, top_j) == pytest.approx(p, abs=0.025)
    for t in range(50):
        assert_weighs(routing, t, logits[t].tolist(), rule)


def test_the_swapped_in_are_any_of_the_others():
    rule, logits = rules(EXPERTS)["softmax"], logits_of(1, TOKENS, EXPERTS)
    routing = routed("random-swap:1", rule, logits, K, top_j=0)
    places = [best_first(z, rule).index(e) for t, z in enumerate(logits.tolist()) for e in ran(routing, t)]
    counts = torch.bincount(torch.tensor(places), minlength=EXPERTS)
    assert not counts[:K].any()
    expected = TOKENS * K / (EXPERTS - K)
    assert (counts[K:] > 0.85 * expected).all() and (counts[K:] < 1.15 * expected).all()


@pytest.mark.parametrize("text", ["random-drop:0", "random-swap:0"])
def test_a_probability_of_0_is_the_model_bit_for_bit(text):
    rule, logits = rules(EXPERTS)["renormalised"], logits_of(1, 100, EXPERTS)
    expected = routed("original", rule, logits, K, state=empty(6, EXPERTS))
    assert_same(routed(text, rule, logits, K, state=empty(6, EXPERTS)), expected)


def test_a_probability_of_1_drops_or_swaps_all_but_the_best():
    rule, logits = rules(EXPERTS)["renormalised"], logits_of(1, 100, EXPERTS)
    assert rate_of(rule, logits, routed("random-drop:1", rule, logits, K), 1) == 1
    assert rate_of(rule, logits, routed("random-swap:1", rule, logits, K, top_j=2), 2) == 1


@pytest.mark.parametrize("text", ["random-drop:0.5", "random-swap:0.5"])
def test_the_same_is_drawn_each_time_however_the_text_is_cut(text):
    rule, logits = rules(EXPERTS)["softmax"], logits_of(1, 60, EXPERTS)
    whole = routed(text, rule, logits, K)
    assert_same(routed(text, rule, logits, K), whole)
    state = empty(EXPERTS, EXPERTS)
    parts = [routed(text, rule, part, K, state=state) for part in logits.split([1, 20, 39])]
    assert torch.equal(torch.cat([part.ids for part in parts], 1), whole.ids)
    assert torch.equal(torch.cat([part.slots >= 0 for part in parts], 1), whole.slots >= 0)
    same_logits = logits[:1].expand(60, -1)
    drawn = routed(text, rule, same_logits, K)
    assert len({tuple(ran(drawn, t)) for t in range(60)}) > 3  # another draw each token
