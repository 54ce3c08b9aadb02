"""Strategies as a user types them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachemoe.kernels.policy import KNOBS, ORIGINAL
from cachemoe.moe.strategies import CachePrior, MaxRank, Pruning, Strategy, checked, policy_of
from cachemoe.offload.errors import InputError

EXPERTS, TOP_K = 60, 4


def parse(text):
    return Strategy.parse(text, EXPERTS, TOP_K)


@pytest.mark.parametrize(
    "text, name, value, label",
    [
        ("original", "original", None, "exact"),
        ("pruning:1", "pruning", 1, "routing changed"),
        ("pruning:3", "pruning", 3, "routing changed"),
        ("max-rank:1", "max-rank", 1, "routing changed"),
        ("max-rank:60", "max-rank", 60, "routing changed"),
        ("cumsum:0.9", "cumsum", 0.9, "routing changed"),
        ("cumsum:1", "cumsum", 1.0, "routing changed"),
        ("cache-prior:0", "cache-prior", 0.0, "exact"),
        ("cache-prior:0.5", "cache-prior", 0.5, "routing changed"),
        ("cache-prior:1", "cache-prior", 1.0, "routing changed"),
        ("cache-prior:1,max-regret=0.01", "cache-prior", 1.0, "routing changed"),
        ("cache-prior:1,max-regret=0", "cache-prior", 1.0, "exact"),
        ("max-rank:6,max-regret=0.5", "max-rank", 6, "routing changed"),
    ],
)
def test_every_form(text, name, value, label):
    strategy = parse(text)
    assert (strategy.name, strategy.value) == (name, value)
    assert strategy.label == label
    assert str(strategy) == text


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "unknown strategy ''"),
        ("lru", "unknown strategy 'lru'"),
        ("Original", "unknown strategy 'Original'"),
        ("max_rank:8", "unknown strategy 'max_rank'"),
        (":8", "unknown strategy ''"),
        ("original:1", "takes no value"),
        ("original:", "takes no value"),
        ("pruning", "needs its K'"),
        ("max-rank", "needs its M"),
        ("cumsum:", "needs its p"),
        ("cache-prior", "needs its lambda"),
        ("max-rank:6.5", "needs its M"),
        ("max-rank:many", "needs its M"),
        ("pruning:nan", "needs its K'"),
        ("cumsum:0,9", "after a comma comes max-regret=bound, as in cumsum:0,max-regret=0.01, not '9'"),
        ("cumsum:0.9,", "after a comma comes max-regret"),
        ("cumsum:0.9,max-regret", "after a comma comes max-regret"),
        ("cumsum:0.9,max-regret=1,max-regret=2", "after a comma comes max-regret"),
        ("cumsum:0.9,max-regret=-1", "max-regret must be a number, 0 or more"),
        ("cumsum:0.9,max-regret=nan", "max-regret must be a number, 0 or more"),
        ("original,max-regret=1", "original swaps no expert for another"),
        ("pruning:2,max-regret=1", "pruning swaps no expert for another"),
        ("cache-prior:0.5:1", "needs its lambda"),
        ("pruning:0", "between 1 and 3"),
        ("pruning:4", "between 1 and 3"),
        ("max-rank:0", "between 1 and 60"),
        ("max-rank:61", "between 1 and 60"),
        ("max-rank:-1", "between 1 and 60"),
        ("cumsum:1.01", "between 0.001 and 1.0"),
        ("cumsum:-0.1", "between 0.001 and 1.0"),
        ("cumsum:nan", "between 0.001 and 1.0"),
        ("cache-prior:nan", "between 0.0 and 1.0"),
        ("cache-prior:inf", "between 0.0 and 1.0"),
        ("cache-prior:1.5", "between 0.0 and 1.0"),
    ],
)
def test_a_bad_form_is_answered_with_a_sentence(text, message):
    with pytest.raises(InputError, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).split()) > 4


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (CachePrior(float("nan")), "lambda of cache-prior must lie between 0.0 and 1.0, not nan"),
        (CachePrior("0.5"), "lambda of cache-prior must be a number, not '0.5'"),
        (CachePrior(None), "lambda of cache-prior must be a number, not None"),
        (CachePrior(0.5, top_j=1.5), "J must be a whole number, 0 or more, not 1.5"),
        (CachePrior(0.5, top_j=TOP_K), f"J must be less than the {TOP_K} experts of a token, not {TOP_K}"),
        (MaxRank(2.5), "M of max-rank must be a whole number, not 2.5"),
        (MaxRank(float("nan")), "M of max-rank must be a whole number, not nan"),
        (Pruning(float("inf")), "K' of pruning must be a whole number, not inf"),
        (Strategy("best", 0.5), "unknown strategy 'best'"),
        (Strategy("original", 0.5), "original takes no value, and 0.5 is one"),
        (0.5, "a routing is a strategy such as CachePrior"),
        (CachePrior, "a routing is a strategy such as CachePrior"),
        ("cache-prior:nan", "must lie between"),
    ],
)
def test_a_strategy_that_cannot_be_is_answered_with_a_sentence(routing, message):
    with pytest.raises(InputError, match=message):
        checked(routing, EXPERTS, TOP_K)


def test_a_strategy_its_text_or_nothing_gives_a_strategy():
    assert checked(None, EXPERTS, TOP_K) == Strategy("original")
    assert checked("cache-prior:0.5", EXPERTS, TOP_K) == checked(CachePrior(0.5), EXPERTS, TOP_K) == CachePrior(0.5)


def test_a_probability_of_zero_is_refused():
    with pytest.raises(InputError):
        parse("cumsum:0")


@given(
    st.one_of(
        st.just(Strategy("original")),
        st.builds(Strategy, st.just("pruning"), st.integers(1, TOP_K - 1)),
        st.builds(Strategy, st.just("max-rank"), st.integers(1, EXPERTS)),
        st.builds(Strategy, st.sampled_from(["cumsum", "cache-prior"]), st.integers(1, 1000).map(lambda i: i / 1000)),
    )
)
def test_what_is_printed_can_be_read_again(strategy):
    assert parse(str(strategy)) == strategy


def test_what_is_printed_can_be_read_again_to_the_last_digit():
    strategy = parse("cache-prior:0.1234567")
    assert parse(str(strategy)) == strategy


@pytest.mark.parametrize(("top_k", "j"), [(1, 0), (2, 1), (3, 2), (8, 2)])
def test_without_a_j_some_place_is_left_to_choose(top_k, j):
    """J = K would keep the model's own choice, whatever the strategy says."""
    knobs = policy_of(Strategy.parse("cache-prior:1", EXPERTS, top_k), top_k=top_k).knobs[0]
    assert knobs[KNOBS.index("j")] == j
    with pytest.raises(InputError, match=f"J must be less than the {top_k} experts"):
        Strategy.parse("cache-prior:1", EXPERTS, top_k, top_k)


def test_a_bound_is_printed_and_read_again():
    strategy = parse("cache-prior:0.5,max-regret=0.007")
    assert (strategy.value, strategy.max_regret) == (0.5, 0.007)
    assert parse(str(strategy)) == strategy
    assert str(parse("cache-prior:0.5,max-regret=inf")) == "cache-prior:0.5"


def test_the_policy_of_caches_has_a_row_of_knobs_for_each():
    policy = policy_of(parse("cache-prior:0.25"), CachePrior(1.0, 0, 0.5), top_k=TOP_K, layer=3, miss_cost=2.0)
    assert [dict(zip(KNOBS, row, strict=True)) for row in policy.knobs.tolist()] == [
        {"j": 2, "a": 0.25, "b": 0, "miss": 2, "regret": math.inf, "seed": 3},
        {"j": 0, "a": 1, "b": 0, "miss": 2, "regret": 0.5, "seed": 3},
    ]
    assert policy.bounded and not policy_of(parse("cache-prior:0.25"), top_k=TOP_K).bounded
    assert policy_of(parse("original")) is ORIGINAL
    with pytest.raises(ValueError, match="one policy routes all caches, not cache-prior, max-rank"):
        policy_of(parse("max-rank:8"), parse("cache-prior:1"))
