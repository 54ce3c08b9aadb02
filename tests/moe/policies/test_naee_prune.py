"""naee-prune against a model without the removed experts, and the order of removal against a search from scratch."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from literal import RULES, assert_same, best_first, calibration_of, empty, logits_of, routed, rules, weights_of

from cachemoe.kernels.state import GateScores
from cachemoe.moe.calibrate import removal_order
from cachemoe.moe.routers import RoutingRule, own_choice, sparsemixer_weights
from cachemoe.offload.errors import InputError

EXPERTS, TOKENS = 10, 60
each_rule = pytest.mark.parametrize("name", RULES)


def without(rule, left):
    """The rule of a model that has these experts alone."""
    return rule if rule.correction is None else replace(rule, correction=rule.correction[left])


@each_rule
@pytest.mark.parametrize(("k", "r"), [(2, 2), (2, 5), (2, 9), (4, 4), (4, 7)])
def test_a_removed_expert_is_as_if_its_row_were_not_there(name, k, r):
    rule, logits = rules(EXPERTS)[name], logits_of(1, TOKENS, EXPERTS)
    order = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(r))
    known = calibration_of(rule, logits, k, removal=order[None].short())
    left = order[EXPERTS - r :].sort().values
    capacity = max(k, r - 1)
    pruned = routed(f"naee-prune:{r}", rule, logits, k, known, empty(capacity, EXPERTS))
    deleted = routed("original", without(rule, left), logits[:, left], k, state=empty(capacity, r))
    assert torch.equal(pruned.ids, left[deleted.ids])
    assert torch.equal(pruned.slots, deleted.slots) and torch.equal(pruned.hits, deleted.hits)
    torch.testing.assert_close(pruned.weights, deleted.weights, rtol=1e-6, atol=0)


@each_rule
def test_with_all_experts_left_nothing_changes(name):
    rule, logits = rules(EXPERTS)[name], logits_of(1, TOKENS, EXPERTS)
    known = calibration_of(rule, logits, 3)
    assert_same(routed(f"naee-prune:{EXPERTS}", rule, logits, 3, known), routed("original", rule, logits, 3))


def mixture(rule, logits, outputs, k, left):
    """``[T, H]`` of a model that has these experts alone, in float64, token by token."""
    rows = []
    for t, z in enumerate(logits[:, left].tolist()):
        chosen = best_first(z, without(rule, left))[:k]
        weights = weights_of(z, chosen, rule)
        rows.append(sum(w * outputs[left[e], t].double() for w, e in zip(weights, chosen, strict=True)))
    return torch.stack(rows)


def sparsemixers(rule, logits, outputs, k, left):
    ids, weights = own_choice(rule, logits[:, left], k)
    own = outputs[torch.tensor(left)[ids], torch.arange(len(ids))[:, None]].double()
    return (weights[..., None] * own).sum(1)


def search(rule, logits, outputs, k, mixture=mixture):
    """Each time the expert whose absence changes the whole layer's output least, all of it computed anew."""
    left, removed = list(range(logits.shape[1])), []
    whole = mixture(rule, logits, outputs, k, left)
    while len(left) > k:
        losses = {}
        for e in left:
            rest = [other for other in left if other != e]
            losses[e] = float((mixture(rule, logits, outputs, k, rest) - whole).square().sum())
        removed.append(min(losses, key=losses.get))
        left.remove(removed[-1])
    return removed + left


@each_rule
@pytest.mark.parametrize(("experts", "k"), [(6, 2), (5, 1), (6, 3), (3, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_removal_is_that_of_a_search_from_scratch(name, experts, k, seed):
    rule, logits = rules(experts)[name], logits_of(seed, 14, experts)
    outputs = logits_of(seed + 10, experts, 14, 3)
    assert removal_order(logits, outputs, rule, k).tolist() == search(rule, logits, outputs, k)


def test_the_order_of_removal_where_weights_are_no_function_of_scores():
    rule = RoutingRule(GateScores(), weigh=partial(sparsemixer_weights, jitter=0.05))
    logits, outputs = logits_of(5, 14, 6), logits_of(6, 6, 14, 3)
    assert removal_order(logits, outputs, rule, 2).tolist() == search(rule, logits, outputs, 2, sparsemixers)


def test_an_expert_that_nothing_chooses_goes_first_and_one_that_all_need_stays():
    logits = logits_of(1, 30, 6)
    logits[:, 4] -= 50
    logits[:, 1] += 20
    for rule in rules(6).values():
        order = removal_order(logits, logits_of(2, 6, 30, 3), replace(rule, correction=None), 2).tolist()
        assert order[0] == 4 and 1 in order[-2:]


GROUPED = RoutingRule(GateScores("sigmoid", 4, 2, "best-two", renormalise=True, epsilon=1e-20), logits_of(4, 8) / 10)


@pytest.mark.parametrize("group_score", ["best", "best-two"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6, 7], [0, 2, 4, 6, 1, 3, 5, 7], [0, 1, 2, 4, 3, 5, 6, 7]])
@pytest.mark.parametrize("r", range(3, 9))
def test_nothing_that_was_removed_runs_where_groups_leave_few(group_score, order, r):
    """Of two of DeepSeek-V3's groups fewer experts may be left than a token chooses: then it is refused."""
    rule, logits = replace(GROUPED, scores=replace(GROUPED.scores, group_score=group_score)), logits_of(1, 300, 8)
    known = calibration_of(rule, logits, 3, removal=torch.tensor([order], dtype=torch.int16))
    removed = torch.tensor(order[: 8 - r], dtype=torch.int64)
    mask = torch.zeros(8).index_fill(0, removed, -1e30)
    chosen = own_choice(replace(rule, correction=rule.correction + mask), logits, 3)[0]
    if torch.isin(chosen, removed).any():
        with pytest.raises(InputError, match="some groups of experts would have too few left for the 3 of a token"):
            routed(f"naee-prune:{r}", rule, logits, 3, known)
    else:
        assert torch.equal(routed(f"naee-prune:{r}", rule, logits, 3, known).ids[0], chosen)
