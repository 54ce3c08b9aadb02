"""HOBBIT against its rules in plain Python: who is fetched at which precision, who leaves, what is fitted."""

from fractions import Fraction

import pytest
import torch
from literal import NEAR, RULES, best_first, calibration_of, logits_of, routed, rules, shares_of

from cachemoe.kernels.eviction import eviction
from cachemoe.kernels.state import Residency
from cachemoe.moe.cheapening import STEPS, hobbit_weights
from cachemoe.moe.policies import hobbit
from cachemoe.moe.shape import MoeShape
from cachemoe.moe.strategies import Strategy
from cachemoe.offload.errors import InputError

EXPERTS, K = 12, 4
each_rule = pytest.mark.parametrize("name", RULES)


def caches(full=5, cheap=6):
    return Residency.empty(torch.tensor([full]), EXPERTS, (cheap,))


def level_by_the_paper(before, have, t1, t2):
    """What runs: a level, or None; ``have`` is what is resident at best: 0, 1 or nothing."""
    if have == 0:
        return 0
    if before <= t1:
        return 0
    if before <= t2 or have == 1:
        return 1
    return None


@each_rule
@pytest.mark.parametrize("t1, t2", [(0.6, 0.9), (0.3, 0.5), (0.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_misses_are_full_up_to_t1_cheap_up_to_t2_and_skipped_beyond(name, t1, t2):
    rule, logits, state = rules(EXPERTS)[name], logits_of(1, 300, EXPERTS), caches()
    known, seen = calibration_of(rule, logits, K), set()
    for z in logits:
        have = {e: level for level in (1, 0) for e in range(EXPERTS) if state.slot_of[0, level * EXPERTS + e] >= 0}
        routing = routed(f"hobbit:{t1}:{t2}", rule, z[None], K, known, state)
        chosen = best_first(z.tolist(), rule)[:K]
        shares = shares_of(z.tolist(), chosen, rule)
        assert routing.ids[0, 0].tolist() == chosen
        for place, level in enumerate(state.levels_of(routing.slots[0, 0]).tolist()):
            before = sum(shares[:place])
            if min(abs(before - t1), abs(before - t2)) < NEAR and place:
                continue
            expected = level_by_the_paper(before, have.get(chosen[place]), t1, t2)
            assert level == (-1 if expected is None else expected)
            seen.add(expected)
    # The shares of sigmoids are so even that three of four experts never have 0.9 of them.
    assert 0 in seen and (1 in seen or t1 == t2) and (None in seen or t2 >= 0.9)


@each_rule
def test_weights_stay_what_they_are_when_others_are_skipped(name):
    rule, logits = rules(EXPERTS)[name], logits_of(2, 200, EXPERTS)
    routing = routed("hobbit:0.3:0.5", rule, logits, K, calibration_of(rule, logits, K), caches())
    own = routed("original", rule, logits, K)
    skipped = routing.slots[0] < 0
    assert skipped.any()
    assert torch.equal(routing.weights[0], own.weights[0].masked_fill(skipped, 0.0))


@each_rule
def test_t1_of_1_is_the_model_bit_for_bit(name):
    rule, logits = rules(EXPERTS)[name], 4 * logits_of(3, 400, EXPERTS)
    known = calibration_of(rule, logits, K)
    plain = routed("original", rule, logits, K, state=Residency.empty(torch.tensor([5]), EXPERTS))
    assert_same_choice(routed("hobbit:1:1", rule, logits, K, known, caches()), plain)


def assert_same_choice(routing, plain):
    """In experts, weights and misses: slots of full precision come after the others."""
    assert torch.equal(routing.ids, plain.ids) and torch.equal(routing.weights, plain.weights)
    assert torch.equal(routing.hits, plain.hits) and torch.equal(routing.misses.pages, plain.misses.pages)
    assert torch.equal(routing.slots, plain.slots + 6)


@pytest.mark.parametrize("text, says", [
    ("hobbit:0.9:0.6", "T1 of hobbit must not exceed T2"), ("hobbit:0.5", "needs its T1 and T2, as in hobbit:0.5:0.5"),
    ("hobbit:0.5:1.5", "T2 of hobbit must lie between"), ("hobbit", "needs its T1 and T2"),
    ("hobbit:nan:0.9", "T1 of hobbit must lie between"),
])  # fmt: skip
def test_bounds_that_cannot_be_are_refused(text, says):
    with pytest.raises(InputError, match=says):
        Strategy.parse(text, EXPERTS, K)


# ------------------------------------------------------------------------------------------------------------ eviction


def priority_by_the_paper(weights, last, uses, heavy, now, layer_of, layer, layers):
    """Equation 3: recency, frequency, frequency at full precision, and how soon the expert's layer runs."""
    lru, lfu, lhu, fld = weights
    near = 1 - Fraction((layer_of - layer) % layers, layers)
    return lru * Fraction(last, now) + lfu * Fraction(uses, now) + lhu * Fraction(heavy, now) + fld * near


@pytest.mark.parametrize("weights", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (3, 2, 1, 4)])
def test_who_leaves_is_as_the_equation_says(weights):
    layers, generator = 3, torch.Generator().manual_seed(0)
    state = Residency.empty(torch.tensor([9]), 4, (5,), layers)
    for now in (1, 7, 400):
        state.clock.fill_(now * layers * K)  # a token touches K experts in each layer
        tokens = torch.randint(0, now + 1, (1, 12), generator=generator)
        state.last_use.copy_(tokens * layers * K)
        state.uses.copy_(torch.randint(0, now + 1, (1, 12), generator=generator))
        state.heavy.copy_(state.uses // 2)
        for layer in range(layers):
            keys = eviction(hobbit.eviction(weights, layers, K), state.of_layer(layer))()[0].tolist()
            expected = [
                priority_by_the_paper(weights, *(int(x[0, e]) for x in (tokens, state.uses, state.heavy)), now,
                                      e // 4, layer, layers)
                for e in range(12)
            ]  # fmt: skip
            assert sorted(range(12), key=keys.__getitem__) == sorted(range(12), key=expected.__getitem__)


def test_cheap_uses_do_not_count_as_heavy():
    rule, logits, state = rules(EXPERTS)["softmax"], logits_of(5, 100, EXPERTS), caches()
    routing = routed("hobbit:0.3:0.6", rule, logits, K, calibration_of(rule, logits, K), state)
    levels = state.levels_of(routing.slots[0])
    for e in range(EXPERTS):
        here = routing.ids[0] == e
        assert int(state.uses[0, e]) == int((here & (levels >= 0)).sum())
        assert int(state.heavy[0, e]) == int((here & (levels == 0)).sum())


def test_the_fitted_weights_cost_least_of_all_that_are_tried():
    rule = rules(8)["softmax"]
    logits = [logits_of(seed, 40, 8) for seed in range(2)]
    shape = MoeShape((0, 1), 8, 2, 8, 8, 8, None)
    calls = []
    fitted = hobbit_weights(logits, [rule, rule], shape, [100, 30], lambda: calls.append(1))
    assert fitted.shape == (4,) and int(fitted.sum()) == STEPS and (fitted >= 0).all()
    assert len(calls) == 35  # of four numbers that sum to four
