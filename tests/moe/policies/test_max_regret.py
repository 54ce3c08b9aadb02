"""The bound of what one swap gives up, against its rule in plain Python."""

import pytest
import torch
from literal import RULES, assert_same, assert_weighs, best_first, empty, logits_of, routed, rules, scores_of

EXPERTS, TOKENS, CAPACITY, K = 14, 80, 6, 4
SWAPPERS = ("max-rank:10", "cumsum:0.9", "cache-prior:1", "random-swap:0.7")
each_rule = pytest.mark.parametrize("name", RULES)
each_swapper = pytest.mark.parametrize("text", SWAPPERS)


@each_rule
@each_swapper
@pytest.mark.parametrize("top_j", [0, 2])
def test_a_bound_of_0_is_the_models_own_choice(name, text, top_j):
    rule, logits = rules(EXPERTS)[name], logits_of(1, TOKENS, EXPERTS)
    expected = routed("original", rule, logits, K, state=empty(CAPACITY, EXPERTS))
    routing = routed(f"{text},max-regret=0", rule, logits, K, state=empty(CAPACITY, EXPERTS), top_j=top_j)
    assert_same(routing, expected)
    assert not torch.equal(routed(text, rule, logits, K, state=empty(CAPACITY, EXPERTS), top_j=0).ids, expected.ids)


@each_rule
@each_swapper
def test_an_infinite_bound_is_none(name, text):
    rule, logits = rules(EXPERTS)[name], logits_of(1, TOKENS, EXPERTS)
    free = routed(text, rule, logits, K, state=empty(CAPACITY, EXPERTS), top_j=1)
    for bound in ("inf", "1e9"):
        state = empty(CAPACITY, EXPERTS)
        assert_same(routed(f"{text},max-regret={bound}", rule, logits, K, state=state, top_j=1), free)


def literally_bounded(free, z, rule, bound):
    """What is left of an unbounded choice's swaps."""
    ranked, scores = best_first(z, rule), scores_of(z, rule)
    own = ranked[:K]
    brought_in = sorted((e for e in free if e not in own), key=ranked.index)
    left_out = sorted((e for e in own if e not in free), key=ranked.index, reverse=True)
    result, given_up = set(free), []
    for new, old in zip(brought_in, left_out, strict=True):
        given_up.append(scores[old] - scores[new])
        if bound == 0 or not given_up[-1] < bound:
            result = result - {new} | {old}
    return sorted(result, key=ranked.index), given_up


@each_rule
@each_swapper
@pytest.mark.parametrize("bound", [0.003, 0.02, 0.1])
@pytest.mark.parametrize("top_j", [0, 2])
def test_just_those_swaps_stay_that_give_up_less(name, text, bound, top_j):
    rule, logits = rules(EXPERTS)[name], logits_of(1, TOKENS, EXPERTS)
    state, kept, undone = empty(CAPACITY, EXPERTS), 0, 0
    for t, z in enumerate(logits.tolist()):
        free = routed(text, rule, logits[t : t + 1], K, state=state.clone(), top_j=top_j)
        expected, given_up = literally_bounded(free.ids[0, 0].tolist(), z, rule, bound)
        assert all(abs(each - bound) > 1e-7 for each in given_up)  # of these logits none is on the edge
        bounded = f"{text},max-regret={bound}"
        routing = routed(bounded, rule, logits[t : t + 1], K, state=state, top_j=top_j)
        assert routing.ids[0, 0].tolist() == expected
        assert_weighs(routing, 0, z, rule)
        stay = sum(each < bound for each in given_up)
        kept, undone = kept + stay, undone + len(given_up) - stay
        # Paired once more, the best with the worst, what remains gives up less.
        _, rest = literally_bounded(expected, z, rule, bound)
        assert len(rest) == stay and all(each < bound for each in rest)
    assert kept and undone
