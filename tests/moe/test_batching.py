"""Batches of requests: Read-ME's rule written out, the rule for sets written out, and that nobody waits for ever."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachemoe.moe.batching import Request, expert_aware, first_come, unique_experts

MOST = 4  # tokens of a batch

experts = st.frozensets(st.integers(0, 5), min_size=1, max_size=3)
new_requests = st.builds(Request, experts, st.integers(1, MOST))
requests = st.builds(Request, experts, st.integers(1, MOST), st.integers(0, 5))


def of(*sets):
    return [Request(frozenset(each)) for each in sets]


def literal_read_me(experts, most):
    """Algorithm 1 with its index repaired: E has the longest queue, and the requests are taken from E's queue."""
    queues = {}
    for place, expert in enumerate(experts):
        queues.setdefault(expert, []).append(place)
    batch = []
    while len(batch) < most and any(queues.values()):
        longest = max(map(len, queues.values()))
        e = min((e for e in queues if len(queues[e]) == longest), key=lambda e: queues[e][0])
        while queues[e] and len(batch) < most:
            batch.append(queues[e].pop(0))
    return batch


@given(st.lists(st.integers(0, 5), max_size=20), st.integers(1, 12))
def test_with_one_expert_each_it_is_read_mes_rule(experts, most):
    queue = of(*([e] for e in experts))
    assert expert_aware(queue, most, math.inf) == literal_read_me(experts, most)


def test_the_requests_are_those_of_the_longest_queue_and_no_other():
    """The printed algorithm takes them from the queue of a loop variable that is stale by then."""
    assert expert_aware(of([3], [1], [2], [1], [0]), 2, math.inf) == [1, 3]


def literal_expert_aware(queue, most, patience):
    batch, have, tokens = [], set(), 0
    while rest := [r for r in queue if r not in batch]:
        if overdue := [r for r in rest if r.waited >= patience]:
            best = overdue[0]
        else:
            fewest = min(len(r.experts - have) for r in rest)
            closest = [r for r in rest if len(r.experts - have) == fewest]
            shared = [sum(len({e} & other.experts) for e in r.experts - have for other in rest) for r in closest]
            best = closest[shared.index(max(shared))]
        tokens += best.tokens
        if tokens > most:
            break
        batch.append(best)
        have |= best.experts
    return [queue.index(r) for r in batch]


@given(st.lists(requests, max_size=8, unique=True), st.integers(0, 6))
def test_it_is_the_literal_rule(queue, patience):
    batch = expert_aware(queue, MOST, patience)
    assert batch == literal_expert_aware(queue, MOST, patience)
    assert sum(queue[place].tokens for place in batch) <= MOST and len(set(batch)) == len(batch)
    assert bool(batch) == bool(queue)


@given(st.lists(requests, max_size=12))
def test_without_patience_it_is_first_come_order(queue):
    batch = first_come(queue, MOST)
    assert batch == list(range(len(batch))) == expert_aware(queue, MOST, 0)
    assert len(batch) == len(queue) or sum(r.tokens for r in queue[: len(batch) + 1]) > MOST


def batches_needed(queue):
    """Batches of first-come order until the queue is empty."""
    count = 0
    while queue:
        queue, count = queue[len(first_come(queue, MOST)) :], count + 1
    return count


def left(queue, taken):
    """Those that wait on, one batch later."""
    return [replace(r, waited=r.waited + 1) for place, r in enumerate(queue) if place not in taken]


@given(st.lists(st.lists(new_requests, max_size=4), max_size=25), st.integers(0, 4))
def test_no_request_waits_longer_than_the_bound(arrivals, patience):
    queue, bounds = [], []  # who waits, and in which batch after its coming each must be at the latest
    while arrivals or queue:
        for request in arrivals.pop(0) if arrivals else []:
            queue.append(request)
            bounds.append(patience + batches_needed(queue))
        taken = expert_aware(queue, MOST, patience)
        assert all(queue[place].waited + 1 <= bounds[place] for place in taken)
        bounds = [bound for place, bound in enumerate(bounds) if place not in taken]
        queue = left(queue, taken)


@pytest.mark.parametrize(("patience", "served"), [(3, 4), (math.inf, None)])
def test_a_request_that_shares_nothing_is_served_when_patience_ends(patience, served):
    """Beside a stream of requests that share an expert."""
    queue, found = of([9], [1], [1]), None
    for batch in range(1, 20):
        taken = expert_aware(queue, 2, patience)
        if any(9 in queue[place].experts for place in taken):
            found = batch
            break
        queue = left(queue, taken) + of([1], [1])
    assert found == served


def test_a_batch_that_shares_needs_fewer_experts():
    queue = of([0, 1], [2, 3], [0, 1], [2, 3])
    aware, plain = expert_aware(queue, 2, 9), first_come(queue, 2)
    assert [unique_experts([queue[i] for i in batch]) for batch in (aware, plain)] == [2, 4]
    assert unique_experts([]) == 0


@pytest.mark.parametrize("tokens", [0, MOST + 1])
def test_a_request_that_no_batch_can_have_is_refused(tokens):
    queue = [Request(frozenset([1]), tokens)]
    for batch in (lambda: first_come(queue, MOST), lambda: expert_aware(queue, MOST, 1)):
        with pytest.raises(ValueError, match=f"a request of {tokens} tokens cannot be in a batch of {MOST} at most"):
            batch()
