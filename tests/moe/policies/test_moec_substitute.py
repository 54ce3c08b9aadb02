"""Substitutes of one's own cluster against the rule in plain Python."""

import pytest
import torch
from literal import RULES, best_first, calibration_of, empty, logits_of, routed, rules, scores_of

from cachemoe.moe.policies.moec_substitute import WORDS
from cachemoe.moe.strategies import Strategy
from cachemoe.offload.errors import InputError

EXPERTS, K = 12, 4
each_rule = pytest.mark.parametrize("name", RULES)


def plain(z, rule, resident, cluster):
    """Experts in their places: an absent one gives way to the best-ranked resident of its cluster that is free."""
    order = best_first(z, rule)
    chosen, used = order[:K], set(order[:K])
    for place, e in enumerate(chosen):
        if place == 0 or e in resident:
            continue
        mates = [o for o in order if o not in used and o in resident and cluster[o] == cluster[e]]
        if mates:
            chosen[place] = mates[0]
            used.add(mates[0])
    return chosen


@each_rule
@pytest.mark.parametrize("likeness", WORDS)
def test_absent_experts_give_way_to_residents_of_their_cluster(name, likeness):
    rule, logits, state = rules(EXPERTS)[name], logits_of(1, 300, EXPERTS), empty(6, EXPERTS)
    clusters = torch.stack([(torch.arange(EXPERTS) * step) % 5 for step in (1, 2, 3)])[:, None].short()
    known = calibration_of(rule, logits, K, clusters=clusters)
    table = Strategy("moec-substitute", likeness).rule.table(known, likeness, EXPERTS)
    cluster = (table if table.dim() == 1 else table[0]).tolist()
    swapped = fetched = 0
    for z in logits.tolist():
        resident = {e for e in range(EXPERTS) if state.slot_of[0, e] >= 0}
        expected = plain(z, rule, resident, cluster)
        routing = routed(f"moec-substitute:{likeness}", rule, torch.tensor([z]), K, known, state)
        assert routing.ids[0, 0].tolist() == expected
        assert routing.asked[0, 0].tolist() == best_first(z, rule)[:K]
        assert routing.hits[0, 0].tolist() == [e in resident for e in expected]
        swapped += sum(a != b for a, b in zip(expected, best_first(z, rule), strict=False))
        fetched += int(routing.misses.count)
    assert swapped > 20 and fetched > 20


@each_rule
def test_a_substitute_keeps_its_own_weight(name):
    rule, logits, state = rules(EXPERTS)[name], logits_of(2, 200, EXPERTS), empty(5, EXPERTS)
    routing = routed("moec-substitute:any", rule, logits, K, calibration_of(rule, logits, K), state)
    for t, z in enumerate(logits.tolist()):
        scores, own = scores_of(z, rule), best_first(z, rule)[:K]
        whole = sum(scores[e] for e in own) + rule.scores.epsilon if rule.scores.renormalise else 1.0
        expected = [rule.scores.scale * scores[e] / whole for e in routing.ids[0, t].tolist()]
        torch.testing.assert_close(routing.weights[0, t], torch.tensor(expected), rtol=1e-5, atol=1e-7)


@each_rule
@pytest.mark.parametrize("likeness", WORDS)
def test_with_everything_resident_it_is_the_model_bit_for_bit(name, likeness):
    rule, logits = rules(EXPERTS)[name], logits_of(3, 300, EXPERTS)
    full = empty(EXPERTS, EXPERTS)
    full.slot_of.copy_(torch.arange(EXPERTS))
    full.page_of.copy_(torch.arange(EXPERTS))
    plain_state = full.clone()
    routing = routed(f"moec-substitute:{likeness}", rule, logits, K, calibration_of(rule, logits, K), full)
    own = routed("original", rule, logits, K, state=plain_state)
    assert torch.equal(routing.ids, own.ids) and torch.equal(routing.weights, own.weights)
    assert not routing.misses.count.any()


def test_a_likeness_that_there_is_not_is_refused():
    with pytest.raises(
        InputError, match="likeness of moec-substitute is gate, output, routed, any, random, not 'best'"
    ):
        Strategy.parse("moec-substitute:best", EXPERTS, K)
    with pytest.raises(InputError, match="moec-substitute is gate"):
        Strategy.parse("moec-substitute", EXPERTS, K)
