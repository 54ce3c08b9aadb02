"""``route`` in C against numpy's, every bit; and which functions C is given to run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachemoe.kernels import route_c
from cachemoe.kernels.expressions import LONGEST, program_of
from cachemoe.kernels.policy import KEY_WORDS, ORIGINAL, Policy
from cachemoe.kernels.route_cpu import place, route_cpu
from cachemoe.kernels.state import SOFTMAX, GateScores, Residency
from cachemoe.moe.policies import RULES
from cachemoe.moe.strategies import Strategy, policy_of
from cachemoe.offload.residency import EVICTION_POLICIES

VALUES = {"max-rank": 9.0, "cumsum": 0.6, "cache-prior": 0.7, "latency-ratio": 0.8, "random-swap": 0.4}
KEYED = sorted(name for name, rule in RULES.items() if rule.key is not None)
SCORES = [
    SOFTMAX,
    GateScores(renormalise=True),
    GateScores("sigmoid", renormalise=True, epsilon=1e-20, scale=2.5),
    GateScores("relu", scale=16.0),
]

pytestmark = pytest.mark.skipif(not route_c.has_c(), reason="there is no C compiler")


def policy_for(name, k, top_j):
    if name == "original":
        return ORIGINAL
    return policy_of(Strategy(name, VALUES.get(name), top_j), top_k=k, layer=2, miss_cost=0.7)


def both(monkeypatch, logits, state, *how):
    """The routing and the state by C, and by numpy."""
    made, results = [], []
    for own in (route_c.route, lambda *_: None):
        stepped = state.clone()
        with monkeypatch.context() as patch:
            patch.setattr(route_c, "route", lambda *a, own=own: made.append(own(*a)) or made[-1])
            results.append((route_cpu(logits, stepped, *how, None), stepped))
    assert made[0] is not None and made[1] is None
    return results


def assert_same(results):
    (routing, state), (expected, like) = results
    for a, b in zip(routing.tensors(), expected.tensors(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, getattr(like, name)), name


def test_every_key_is_run():
    assert set(VALUES) == set(KEYED)


@pytest.mark.parametrize("eviction", EVICTION_POLICIES)
@pytest.mark.parametrize("name", ["original", *KEYED])
@given(data=st.data())
@settings(max_examples=30)
def test_the_same_bits_as_numpy(monkeypatch_module, name, eviction, data):
    k = data.draw(st.integers(1, 20))
    experts = data.draw(st.integers(k, 70))
    scores = data.draw(st.sampled_from(SCORES[:2] if name == "cumsum" else SCORES))
    seed, coarse = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.booleans())
    logits = 2 * torch.randn(1, data.draw(st.integers(0, 6)), experts, generator=torch.Generator().manual_seed(seed))
    logits = logits.round() if coarse else logits  # with ties
    correction = torch.randn(experts, generator=torch.Generator().manual_seed(seed + 1)) / 10
    state = Residency.empty(torch.tensor([data.draw(st.integers(k, experts))]), experts)
    evict, policy = EVICTION_POLICIES[eviction], policy_for(name, k, data.draw(st.integers(0, k)))
    route_cpu(logits.flip(1), state, evict, k, ORIGINAL, SOFTMAX, None, None)  # warm
    how = evict, k, policy, scores, data.draw(st.sampled_from([None, correction]))
    assert_same(both(monkeypatch_module, logits, state, *how))


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@given(st.integers(1, 20), st.integers(0, 2**32 - 1), st.integers(1, 4))
@settings(max_examples=30)
def test_what_has_been_chosen_is_placed_as_numpy_does(k, seed, tokens):
    generator = torch.Generator().manual_seed(seed)
    weights, ids = torch.rand(1, tokens, 30, generator=generator).round(decimals=1).topk(k)
    state, results = Residency.empty(torch.tensor([k + 3]), 30), []
    for own in (route_c.place, lambda *_: None):
        stepped = state.clone()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(route_c, "place", own)
            results.append((place(ids, weights, stepped, EVICTION_POLICIES["lfu"]), stepped))
    assert_same(results)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_changes_nothing(value):
    state = Residency.empty(torch.tensor([5]), 8)
    before, logits = state.clone(), torch.randn(1, 3, 8)
    logits[0, 2, 3] = value
    assert route_c.route(logits, state, EVICTION_POLICIES["lru"], 2, ORIGINAL, SOFTMAX, None) is None
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, getattr(before, name))


def calls(value):
    return abs(value)


def two_statements(value, a):
    b = value * a
    return b


def chained(rank, a, b):
    return 1.0 * (a < rank < b)


def deep(value):
    return value + (value + (value + (value + (value + (value + (value + (value + (value + value))))))))


lambdas = {"of a key": lambda value: value}


@pytest.mark.parametrize("function", [calls, two_statements, chained, deep, lambdas["of a key"], len])
def test_a_function_that_c_does_not_know_is_left_to_numpy(function):
    assert program_of(function, KEY_WORDS, False) is None


def test_of_grades_groups_and_bounds_numpy_is_in_charge():
    for policy, scores in (
        (Policy(grade=RULES["naee-skip"].grade, knobs=torch.zeros(1, 6)), SOFTMAX),
        (policy_of(Strategy("cache-prior", 0.5, 1, 0.1), top_k=2), SOFTMAX),
        (ORIGINAL, GateScores(groups=4, top_groups=2)),
        (policy_for("cumsum", 2, 0), GateScores("sigmoid")),
    ):
        state = Residency.empty(torch.tensor([5]), 8)
        assert route_c.route(torch.randn(1, 1, 8), state, EVICTION_POLICIES["lru"], 2, policy, scores, None) is None


def test_every_rules_functions_are_short_enough():
    for name in KEYED:
        assert len(program_of(RULES[name].key, KEY_WORDS, False)) < LONGEST
