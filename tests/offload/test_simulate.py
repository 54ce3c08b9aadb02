"""Belady's MIN against every possible choice, against LRU, and on real routing; and what lies between the two."""

import json
import math
from functools import cache
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachemoe.kernels.reference_route import route
from cachemoe.kernels.state import Residency
from cachemoe.moe.strategies import CachePrior, policy_of
from cachemoe.offload.residency import least_recently_used
from cachemoe.offload.simulate import belady_misses, lookahead_misses, replay
from cachemoe.offload.simulate import lru_misses as all_lru_misses

QWEN_EXPERTS = 60


def fewest_misses(ids, capacity):
    """Try every set of experts that could leave, at every token."""

    @cache
    def from_here(t, resident):
        if t == len(ids):
            return 0
        needed = frozenset(ids[t])
        missing, others = needed - resident, resident - needed
        leaving = max(0, len(resident | needed) - capacity)
        rest = (from_here(t + 1, (resident | needed) - set(out)) for out in combinations(others, leaving))
        return len(missing) + min(rest)

    return from_here(0, frozenset())


def lru_misses(ids, capacity):
    order, misses = [], 0  # least recent first
    for token in ids:
        misses += sum(e not in order for e in token)
        order = [e for e in order if e not in token] + token[::-1]
        del order[: max(0, len(order) - capacity)]
    return misses


def traces(experts, tokens):
    """(ids, capacity)"""

    def of_width(k):
        token = st.lists(st.integers(0, experts - 1), min_size=k, max_size=k, unique=True)
        return st.tuples(st.lists(token, min_size=1, max_size=tokens), st.integers(k, experts))

    return st.integers(1, 3).flatmap(of_width)


@given(traces(experts=6, tokens=9))
def test_belady_equals_the_best_of_all_choices(trace):
    ids, capacity = trace
    assert belady_misses(torch.tensor(ids), capacity) == fewest_misses(ids, capacity)


@given(traces(experts=10, tokens=60))
def test_belady_never_misses_more_than_lru(trace):
    ids, capacity = trace
    assert belady_misses(torch.tensor(ids), capacity) <= lru_misses(ids, capacity)


@given(traces(experts=10, tokens=60))
def test_with_room_for_all_only_first_uses_miss(trace):
    ids, _ = trace
    assert belady_misses(torch.tensor(ids), 10) == len({e for token in ids for e in token})


def test_a_capacity_below_one_tokens_experts_is_refused():
    with pytest.raises(ValueError, match="2 slots cannot hold the 3 experts"):
        belady_misses(torch.tensor([[0, 1, 2]]), 2)


@pytest.fixture(scope="module")
def real_routing(shared_data):
    """``[2, T, K]`` ids of the layers 0 and 12 of Qwen1.5-MoE-A2.7B, the server's warm-up dropped."""
    layers = []
    for layer in (0, 12):
        with open(shared_data / f"qwen1.5-moe-a2.7b-gsm8k-layer{layer}.jsonl") as file:
            rows = [row["topk_ids"] for row in map(json.loads, file) if row["type"] == "route"]
        warm_up = next(t for t, row in enumerate(rows) if row != rows[0])
        layers.append(rows[warm_up:])
    shortest = min(map(len, layers))
    return torch.tensor([rows[:shortest] for rows in layers])


def test_miss_rates_on_real_routing_at_half_the_experts(real_routing):
    _, tokens, k = real_routing.shape
    capacity = QWEN_EXPERTS // 2
    gate = torch.arange(k, 0, -1.0).expand(real_routing.shape)
    logits = torch.zeros(2, tokens, QWEN_EXPERTS).scatter_(2, real_routing, gate)
    state = Residency.empty(torch.tensor([capacity] * 2), QWEN_EXPERTS)
    routing = route(logits, state, least_recently_used, k)
    assert torch.equal(routing.ids, real_routing)
    for ids, hits in zip(real_routing, routing.hits, strict=True):
        misses = int((~hits).sum())
        assert misses == lru_misses(ids.tolist(), capacity)
        assert 0.40 < misses / ids.numel() < 0.50
        assert belady_misses(ids, capacity) < misses


# ------------------------------------------------------------------------------------------ knowing the next W tokens


def literal_lookahead_misses(ids, capacity, window):
    """At each miss: of the residents that the window does not use the one touched longest ago; else the farthest."""
    resident, touched, misses = set(), {}, 0
    for t, token in enumerate(ids):
        for e in token:
            if e not in resident:
                misses += 1
                if len(resident) == capacity:
                    others = [o for o in resident if o not in token]
                    coming = ids[t + 1 : t + 1 + window]
                    unknown = [o for o in others if not any(o in later for later in coming)]
                    if unknown:
                        victim = min(unknown, key=touched.__getitem__)
                    else:
                        victim = max(others, key=lambda o: next(i for i, later in enumerate(coming) if o in later))
                    resident.remove(victim)
                resident.add(e)
        for place, e in enumerate(token):
            touched[e] = (t, -place)  # the highest gate weight, which comes first, is touched last
    return misses


@given(traces(experts=8, tokens=40), st.integers(0, 8))
def test_lookahead_is_the_literal_rule(trace, window):
    ids, capacity = trace
    assert lookahead_misses(torch.tensor(ids), capacity, window) == literal_lookahead_misses(ids, capacity, window)


@given(traces(experts=10, tokens=60))
def test_a_window_of_nothing_is_lru(trace):
    ids, capacity = trace
    found = lookahead_misses(torch.tensor(ids), capacity, 0)
    assert found == lru_misses(ids, capacity) == all_lru_misses(torch.tensor(ids), 10)[capacity]


@given(traces(experts=6, tokens=9))
def test_a_window_of_everything_is_belady(trace):
    ids, capacity = trace
    for window in (len(ids), math.inf):
        assert lookahead_misses(torch.tensor(ids), capacity, window) == fewest_misses(ids, capacity)


def test_a_window_below_nothing_is_refused():
    for window in (-1, math.nan):
        with pytest.raises(ValueError, match=f"a window of {window} tokens cannot be"):
            lookahead_misses(torch.tensor([[0]]), 1, window)


def test_on_real_routing_a_window_leads_from_lru_to_belady(real_routing):
    for ids in real_routing:
        misses = [lookahead_misses(ids, QWEN_EXPERTS // 2, window) for window in (0, 2, 8, 32, math.inf)]
        assert misses[0] == lru_misses(ids.tolist(), QWEN_EXPERTS // 2)
        assert misses[-1] == belady_misses(ids, QWEN_EXPERTS // 2)
        assert misses == sorted(misses, reverse=True) and len(set(misses)) == len(misses)


# --------------------------------------------------------------------------------------- LRU in every capacity at once


def as_logits(ids, experts):
    """``[T, E]`` of which the model chooses these experts, in their order."""
    tokens, k = ids.shape
    return torch.zeros(tokens, experts).scatter_(1, ids, torch.arange(k, 0, -1.0).expand(tokens, k))


@given(traces(experts=9, tokens=40))
def test_misses_in_every_capacity_are_those_of_lru(trace):
    ids, _ = trace
    k, found = len(ids[0]), all_lru_misses(torch.tensor(ids), 9).tolist()
    assert len(found) == 10 and found[:k] == [float("inf")] * k
    assert found[k:] == [lru_misses(ids, capacity) for capacity in range(k, 10)]


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (12, 4), (6, 1), (5, 5)])
@pytest.mark.parametrize("skew", [0.0, 1.5])
def test_misses_in_every_capacity_are_those_of_a_cache_that_is_stepped(experts, k, skew):
    """As routed; the more skewed, the more the trace has favourites."""
    generator = torch.Generator().manual_seed(experts)
    logits = torch.randn(150, experts, generator=generator) - skew * torch.arange(experts) / experts
    ids = logits.topk(k).indices
    found = all_lru_misses(ids, experts)
    assert found.dtype == torch.float32 and found[:k].isinf().all()
    for capacity in range(k, experts + 1):
        state = Residency.empty(torch.tensor([capacity]), experts)
        routing = route(as_logits(ids, experts)[None], state, least_recently_used, k)
        assert torch.equal(routing.ids[0], ids)
        assert int(routing.misses.count) == found[capacity]
    assert (found[k:].diff() <= 0).all() and found[experts] == len(ids.unique())


def test_replay_is_route_in_a_cold_cache_for_each_capacity():
    logits, policy = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)), policy_of(CachePrior(0.4, 1))
    together = replay(logits.half(), policy, [3, 6, 12], 3)
    for row, capacity in enumerate((3, 6, 12)):
        state = Residency.empty(torch.tensor([capacity]), 12)
        alone = route(logits.half()[None], state, least_recently_used, 3, policy)
        assert torch.equal(together.ids[row], alone.ids[0]) and torch.equal(together.slots[row], alone.slots[0])
        assert int(together.misses.count[row]) == int(alone.misses.count[0])
