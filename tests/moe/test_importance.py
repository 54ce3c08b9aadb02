"""Levels by importance: the literal rule, how often the loss is asked for, and what is tolerated."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachemoe.moe.importance import TOLERANCE, assign_levels
from cachemoe.offload.errors import InputError

LAYERS, EXPERTS = 3, 7


def random(seed):
    return torch.rand(LAYERS, EXPERTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Loss:
    """Each expert loses its importance for each level, one after the other; what was asked for is kept."""

    def __init__(self, importance, at_level=(0.0, 1.0, 3.0)):
        self.importance, self.at_level, self.asked = importance, torch.tensor(at_level, dtype=torch.float64), []

    def __call__(self, levels):
        assert levels.dtype == torch.int64 and levels.shape == self.importance.shape
        self.asked.append(levels.clone())
        return float((self.importance * self.at_level[levels]).sum())


def least_important(importance, count):
    """(layer, expert) of those of least importance, the first of equals."""
    every = [(layer, e) for layer in range(LAYERS) for e in range(EXPERTS)]
    return sorted(every, key=lambda at: float(importance[at]))[:count]


def literal_levels(importance, level, count):
    levels = [[level] * EXPERTS for _ in range(LAYERS)]
    for layer, e in least_important(importance, count):
        levels[layer][e] = level + 1
    return torch.tensor(levels)


@given(st.integers(0, 10**6), st.floats(0.001, 5.0), st.integers(2, 3))
def test_as_many_of_the_least_important_are_cheaper_as_is_tolerated(seed, share, levels):
    importance = random(seed)
    loss = Loss(importance)
    tolerated = share * float(importance.sum())
    found = assign_levels(importance, tolerated, loss, levels)
    lost = loss(found)
    assert lost <= tolerated
    if bool((found == levels - 1).all()):
        return
    level, count = int(found.min()), int((found > found.min()).sum())
    if len(found.unique()) == 1:
        level, count = int(found[0, 0]), 0
    assert torch.equal(found, literal_levels(importance, level, count))
    one_more = loss(literal_levels(importance, level, count + 1))
    assert one_more > tolerated or lost >= (1 - TOLERANCE) * tolerated


@given(st.integers(0, 10**6), st.floats(0.001, 5.0), st.integers(2, 3))
def test_the_loss_is_asked_for_a_few_times_and_of_what_is_returned(seed, share, levels):
    loss = Loss(random(seed))
    found = assign_levels(loss.importance, share * float(loss.importance.sum()), loss, levels)
    assert len(loss.asked) <= levels + math.ceil(math.log2(LAYERS * EXPERTS))
    assert any(torch.equal(found, each) for each in loss.asked)
    uniform = [int(each[0, 0]) for each in loss.asked if len(each.unique()) == 1]
    assert uniform[: len(set(uniform))] == list(range(levels - 1, levels - 1 - len(set(uniform)), -1))


def test_two_levels_bracket_what_is_tolerated():
    """At 0, 1 and 3 for each unit of importance: 2 lies between the second level and the third."""
    importance = torch.full((LAYERS, EXPERTS), 1.0)
    found = assign_levels(importance, 2.0 * LAYERS * EXPERTS, Loss(importance.double()), levels=3)
    cheaper = (found == 2).sum()
    assert sorted(found.unique().tolist()) == [1, 2] and 2 * cheaper + LAYERS * EXPERTS <= 2.0 * LAYERS * EXPERTS
    assert 2 * cheaper + LAYERS * EXPERTS >= (1 - TOLERANCE) * 2.0 * LAYERS * EXPERTS
    assert torch.equal(found, literal_levels(importance, 1, int(cheaper)))  # equals: the first


def test_where_the_cheapest_level_is_tolerated_all_have_it():
    loss = Loss(random(0))
    assert torch.equal(assign_levels(loss.importance, 1e9, loss), torch.ones(LAYERS, EXPERTS, dtype=torch.int64))
    assert len(loss.asked) == 1


def test_where_nothing_is_tolerated_all_stay_as_they_are():
    loss = Loss(random(0) + 0.1)
    assert torch.equal(assign_levels(loss.importance, 1e-9, loss), torch.zeros(LAYERS, EXPERTS, dtype=torch.int64))


def test_a_loss_that_is_no_number_is_not_tolerated():
    importance = random(0)

    def broken(levels):
        return float("nan") if (levels == 1).sum() > 5 else 0.0

    assert int(assign_levels(importance, 1.0, broken).sum()) == 5


def test_a_finest_level_that_loses_too_much_is_refused():
    with pytest.raises(InputError, match=r"finest level lose 0\.5, more than the 0\.02 that is tolerated") as caught:
        assign_levels(random(0), 0.02, lambda levels: 0.5)
    assert "\n" not in str(caught.value)
