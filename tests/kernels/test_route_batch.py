"""Sequences that take their steps together: held to each alone against the step's residency, and to any other order."""

import pytest
import torch

from cachemoe.kernels import route_c
from cachemoe.kernels.policy import ORIGINAL
from cachemoe.kernels.reference_route import settle
from cachemoe.kernels.route import route
from cachemoe.kernels.route_batch import place_batch, route_batch
from cachemoe.kernels.route_cpu import place
from cachemoe.kernels.state import SOFTMAX, GateScores, Residency
from cachemoe.moe.strategies import Strategy, policy_of
from cachemoe.offload.residency import least_frequently_used, least_recently_used

E, K = 12, 3
STRATEGIES = (
    "original",
    "cache-prior:0.5",
    "max-rank:6",
    "cumsum:0.8",
    "random-drop:0.3",
    "random-swap:0.4",
    "pruning:2",
)


def policy_named(text):
    return policy_of(Strategy.parse(text, E, K, 1), top_k=K, experts=E) if text != "original" else ORIGINAL


@pytest.fixture(params=[True, False], ids=["c", "python"], autouse=True)
def in_c(request, monkeypatch):
    """Both ways to route a batch of a plain cache."""
    if not request.param:
        monkeypatch.setattr(route_c, "route", lambda *_: None)
        monkeypatch.setattr(route_c, "place", lambda *_: None)
    elif not route_c.has_c():
        pytest.skip("there is no C compiler")


def warm(seed, capacity=6, cheaper=(), layers=None):
    """A cache that a few tokens have used."""
    state = Residency.empty(torch.tensor([capacity]), E, cheaper, layers)
    route(logits_of(seed, 1, 9), state.of_layer(0) if layers else state, least_recently_used, K)
    return state


def logits_of(seed, *shape):
    return 2 * torch.randn(*shape, E, generator=torch.Generator().manual_seed(seed))


def assert_same_state(a, b):
    for name, tensor in a.tensors().items():
        assert torch.equal(tensor, b.tensors()[name]), name


@pytest.mark.parametrize("strategy", [each for each in STRATEGIES if each != "random-drop:0.3"])
@pytest.mark.parametrize("evict", [least_recently_used, least_frequently_used])
def test_one_sequence_is_stepped_as_ever(strategy, evict):
    policy, logits = policy_named(strategy), logits_of(1, 1, 7)
    k = 2 if strategy.startswith("pruning") else K
    one, other = warm(0), warm(0)
    given, expected = route_batch(logits, one, evict, k, policy, SOFTMAX), route(logits, other, evict, k, policy)
    for a, b in zip(given.tensors(), expected.tensors(), strict=True):
        assert torch.equal(a, b)
    assert_same_state(one, other)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("capacity", [3, 6, 12])
def test_each_sees_the_residency_before_the_step(strategy, capacity):
    policy, logits = policy_named(strategy), logits_of(2, 4, 5)
    k = 2 if strategy.startswith("pruning") else K
    state = warm(0, capacity)
    for t in range(5):
        alone = [route(row[None, t : t + 1], state.clone(), least_recently_used, k, policy) for row in logits]
        together = route_batch(logits[:, t : t + 1], state, least_recently_used, k, policy, SOFTMAX)
        for i, each in enumerate(alone):
            assert torch.equal(together.ids[0, i], each.ids[0, 0])
            assert torch.equal(together.weights[0, i], each.weights[0, 0])
            assert torch.equal(together.hits[0, i], each.hits[0, 0])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("capacity", "cheaper", "layers"), [(3, (), None), (6, (), None), (6, (4,), None), (8, (), 3)])
@pytest.mark.parametrize("evict", [least_recently_used, least_frequently_used])
def test_the_order_of_the_sequences_changes_nothing(strategy, capacity, cheaper, layers, evict):
    policy, logits = policy_named(strategy), logits_of(3, 5, 6)
    k = 2 if strategy.startswith("pruning") else K
    order = torch.tensor([3, 0, 4, 2, 1])
    states = [warm(0, capacity, cheaper, layers) for _ in range(2)]
    views = [state.of_layer(1) if layers else state for state in states]
    first = route_batch(logits, views[0], evict, k, policy, SOFTMAX)
    other = route_batch(logits[order], views[1], evict, k, policy, SOFTMAX)
    for name in ("ids", "weights", "hits", "slots"):
        a, b = (getattr(each, name).view(5, 6, k) for each in (first, other))
        assert torch.equal(a[order], b), name
    for a, b in zip(first.tensors()[4:], other.tensors()[4:], strict=True):  # the misses
        assert torch.equal(a, b)
    assert_same_state(*states)


def test_a_step_touches_each_expert_once_and_the_best_stay():
    """By hand: of three sequences' experts, four slots keep the first choices and the weightiest second one."""
    state = Residency.empty(torch.tensor([4]), E)
    ids = torch.tensor([[[0, 1]], [[2, 3]], [[0, 4]]])
    weights = torch.tensor([[[0.9, 0.1]], [[0.6, 0.4]], [[0.7, 0.3]]])
    routing = place_batch(ids, weights, state, least_recently_used)
    # In order: 0 (0.9), 2 (0.6), then 3 (0.4), 4 (0.3), 1 (0.1), which has no slot.
    assert state.page_of.tolist() == [[0, 2, 3, 4]] and state.slot_of[0, 1] == -1
    assert state.last_use[0, [0, 2, 3, 4]].tolist() == [4, 3, 2, 1] and state.clock.tolist() == [4]
    assert state.uses[0].tolist() == [1, 0, 1, 1, 1, *[0] * 7]
    assert not routing.hits.any() and routing.misses.pages[0].tolist() == [0, 2, 3, 4, -1, -1]
    assert routing.slots.tolist() == [[[0, 0], [1, 2], [0, 3]]]
    again = place_batch(ids[:1], weights[:1], state, least_recently_used)
    assert again.hits.tolist() == [[[True, False]]] and state.page_of.tolist() == [[0, 2, 3, 1]]


def test_what_others_chose_is_placed_likewise():
    ids = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(i))[:K] for i in range(20)]).view(
        4, 5, K
    )
    weights = torch.rand(4, 5, K, generator=torch.Generator().manual_seed(5))
    drops = torch.rand(4, 5, K, generator=torch.Generator().manual_seed(6)) < 0.3
    one, other = warm(0), warm(0)
    given = place_batch(ids[:1], weights[:1], one, least_recently_used)
    expected = place(ids[:1], weights[:1], other, least_recently_used)
    for a, b in zip(given.tensors(), expected.tensors(), strict=True):
        assert torch.equal(a, b)
    assert_same_state(one, other)
    order = torch.tensor([2, 3, 1, 0])
    first = place_batch(ids, weights, one, least_frequently_used, drops)
    second = place_batch(ids[order], weights[order], other, least_frequently_used, drops[order])
    assert torch.equal(first.slots.view(4, 5, K)[order], second.slots.view(4, 5, K))
    assert_same_state(one, other)


def test_scores_in_groups_and_corrections():
    scores = GateScores("sigmoid", 3, 2, "best-two", True, 1e-20, 2.5)
    correction, logits, state = torch.linspace(-0.3, 0.3, E), logits_of(7, 3, 1), warm(0)
    alone = [route(row[None], state.clone(), least_recently_used, K, ORIGINAL, scores, correction) for row in logits]
    together = route_batch(logits, state, least_recently_used, K, ORIGINAL, scores, correction)
    assert torch.equal(together.ids[0], torch.cat([each.ids[0] for each in alone]))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("capacity", [3, 6, 12])
@pytest.mark.parametrize("evict", [least_recently_used, least_frequently_used])
def test_c_and_python_agree(monkeypatch, strategy, capacity, evict):
    policy, logits = policy_named(strategy), logits_of(8, 5, 7)
    k = 2 if strategy.startswith("pruning") else K
    correction = torch.linspace(-0.2, 0.2, E) if strategy in ("original", "cache-prior:0.5") else None
    scores, states, given = GateScores("sigmoid", renormalise=True), [warm(0, capacity) for _ in range(2)], []
    for state in states:
        given.append(route_batch(logits, state, evict, k, policy, scores, correction))
        given.append(place_batch(given[-1].ids.view(5, 7, k), given[-1].weights.view(5, 7, k), state, evict))
        monkeypatch.setattr(route_c, "route", lambda *_: None)
        monkeypatch.setattr(route_c, "place", lambda *_: None)
    for one, other in zip(given[:2], given[2:], strict=True):
        for a, b in zip(one.tensors(), other.tensors(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)  # torch's sigmoid depends on what is beside it
    assert_same_state(*states)


def test_an_expert_at_two_levels_in_one_step_is_touched_twice():
    state = Residency.empty(torch.tensor([4]), E, (4,))
    ran = [(2, 2, 2, False), (1, 1, 1, False), (2, E + 2, E + 2, False)]
    settle(ran, state, 0, least_recently_used)
    assert state.uses[0, :3].tolist() == [0, 1, 2] and state.heavy[0, :3].tolist() == [0, 1, 1]
    assert state.last_use[0, 1:3].tolist() == [2, 3]
