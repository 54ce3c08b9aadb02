"""Eviction against plain dicts, and residency as a set of tensors."""

from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachemoe.kernels.reference_route import route
from cachemoe.kernels.state import Residency
from cachemoe.offload.residency import least_frequently_used, least_recently_used

EXPERTS = 8


def replay(ids, state, evict):
    """Route tokens whose logits force the given ids, each token's highest gate weight first."""
    logits = torch.full((1, len(ids), EXPERTS), -100.0)
    for t, token in enumerate(ids):
        for k, e in enumerate(token):
            logits[0, t, e] = -float(k)
    routing = route(logits, state, evict, len(ids[0]))
    assert routing.ids[0].tolist() == ids
    return routing.hits[0].tolist()


def residents(state):
    return {e for e, slot in enumerate(state.slot_of[0].tolist()) if slot >= 0}


@st.composite
def traces(draw):
    """(ids, capacity)"""
    k = draw(st.integers(1, 3))
    token = st.lists(st.integers(0, EXPERTS - 1), min_size=k, max_size=k, unique=True)
    return draw(st.lists(token, min_size=1, max_size=40)), draw(st.integers(k, EXPERTS))


def literal_lru(ids, capacity):
    cache, hits = OrderedDict(), []
    for token in ids:
        hits.append([e in cache for e in token])
        for e in token:
            if e not in cache:
                if len(cache) == capacity:
                    del cache[next(old for old in cache if old not in token)]
                cache[e] = None
        for e in reversed(token):
            cache.move_to_end(e)
    return hits, cache


def literal_lfu(ids, capacity):
    cache, uses, last, touches, hits = set(), dict.fromkeys(range(EXPERTS), 0), {}, 0, []
    for token in ids:
        hits.append([e in cache for e in token])
        for e in token:
            if e not in cache:
                if len(cache) == capacity:
                    cache.remove(min(cache.difference(token), key=lambda old: (uses[old], last[old])))
                cache.add(e)
        for e in reversed(token):
            touches += 1
            uses[e] += 1
            last[e] = touches
    return hits, cache


@given(traces())
def test_lru_equals_an_ordered_dict(trace):
    ids, capacity = trace
    state = Residency.empty(torch.tensor([capacity]), EXPERTS)
    hits, cache = literal_lru(ids, capacity)
    assert replay(ids, state, least_recently_used) == hits
    assert sorted(residents(state), key=lambda e: state.last_use[0, e].item()) == list(cache)


@given(traces())
def test_lfu_equals_a_dict_of_uses(trace):
    ids, capacity = trace
    state = Residency.empty(torch.tensor([capacity]), EXPERTS)
    hits, cache = literal_lfu(ids, capacity)
    assert replay(ids, state, least_frequently_used) == hits
    assert residents(state) == cache


def test_lfu_never_evicts_what_the_token_needs():
    state = Residency.empty(torch.tensor([2]), EXPERTS)
    replay([[0, 1], [0, 1], [0, 2], [1, 2]], state, least_frequently_used)
    assert residents(state) == {1, 2}  # 2 has the fewest uses, and the token needs it


def test_lru_and_lfu_differ():
    ids = [[0], [0], [1], [2]]
    for evict, expected in ((least_recently_used, {1, 2}), (least_frequently_used, {0, 2})):
        state = Residency.empty(torch.tensor([2]), EXPERTS)
        replay(ids, state, evict)
        assert residents(state) == expected


def test_lfu_takes_the_least_recent_among_equals():
    state = Residency.empty(torch.tensor([2]), EXPERTS)
    replay([[5], [3], [4]], state, least_frequently_used)
    assert residents(state) == {3, 4}


@pytest.mark.parametrize("capacity", [0, -1, EXPERTS + 1])
def test_a_capacity_out_of_range_is_refused(capacity):
    with pytest.raises(ValueError, match=f"between 1 and the {EXPERTS} experts"):
        Residency.empty(torch.tensor([2, capacity]), EXPERTS)


def test_empty_has_nothing_resident():
    state = Residency.empty(torch.tensor([[1, 2], [3, 2]]), EXPERTS)
    assert state.slot_of.shape == (2, 2, EXPERTS)
    assert state.page_of.shape == (2, 2, 3)
    assert not state.resident().any()
    assert (state.page_of == -1).all()


def test_empty_does_not_share_the_callers_capacity():
    capacity = torch.tensor([2])
    state = Residency.empty(capacity, EXPERTS)
    capacity += 1
    assert state.capacity.tolist() == [2]


def test_indexing_gives_views():
    state = Residency.empty(torch.tensor([2, 3]), EXPERTS)
    replay([[4, 1]], state[1:2], least_recently_used)
    assert state.slot_of[1, [4, 1]].tolist() == [0, 1]
    assert (state.clock.tolist(), state.tokens.tolist()) == ([0, 2], [0, 1])
    assert not state[0].resident().any()
    for name, tensor in state.tensors().items():
        assert getattr(state[1], name)._base is tensor, name


def test_a_clone_is_independent():
    state = Residency.empty(torch.tensor([2]), EXPERTS)
    clone = state.clone()
    replay([[4, 1]], state, least_recently_used)
    for name, tensor in state.tensors().items():
        if name != "capacity":
            assert not torch.equal(tensor, getattr(clone, name)), name
    assert not clone.resident().any()
