"""route on each backend, the kernel and the CPU's implementation, against the reference: every field, every integer."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cachemoe.kernels import reference_route
from cachemoe.kernels.policy import GRADE_WORDS, KEY_WORDS, KNOBS, ORIGINAL, Policy
from cachemoe.kernels.route import FUSED_TOKENS, route, route_hidden
from cachemoe.kernels.route_cpu import peek, place
from cachemoe.kernels.route_gpu import plan_route, warps_of
from cachemoe.kernels.state import SOFTMAX, STATE, GateScores, Residency, Routing
from cachemoe.moe.policies import RULES
from cachemoe.moe.strategies import CachePrior, CumSum, MaxRank, Strategy, policy_of
from cachemoe.offload.residency import EVICTION_POLICIES, least_frequently_used, least_recently_used

LRU = EVICTION_POLICIES["lru"]
WEIGHT_TOLERANCE = 1e-5 if torch.cuda.is_available() else 2e-6  # a GPU's exp is an approximation
V2 = GateScores(groups=4, top_groups=2, scale=16.0)
V3 = GateScores("sigmoid", 4, 2, "best-two", renormalise=True, epsilon=1e-20, scale=2.5)

BACKENDS = [
    "cpu",
    pytest.param(
        "interpreter", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernel is compiled")
    ),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.gpu_only("interpreted, it is the backend before")]),
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def on(device, value):
    """A policy or a tensor or nothing, with its tensors on a device."""
    return None if value is None else value.to(device)


def poisoned(caches, tokens, k, device="cpu"):
    out = Routing.empty(caches, tokens, k, device)
    for tensor in out.tensors():
        tensor.fill_(10**9 if tensor.dtype == torch.int64 else True if tensor.dtype == torch.bool else torch.nan)
    return out


def copied(out, result):
    for tensor, value in zip(out.tensors(), result.tensors(), strict=True):
        tensor.copy_(value)
    out.asked = on("cpu", result.asked)
    return out


def run(backend, logits, state, evict, k, policy=ORIGINAL, scores=SOFTMAX, correction=None):
    """Route on a backend, into poisoned outputs; ``state`` is the CPU's."""
    caches, tokens, _ = logits.shape
    out = poisoned(caches, tokens, k)
    if backend == "cpu":
        assert route(logits, state, evict, k, policy, scores, correction, out) is out
    elif backend == "interpreter":
        if state.levels > 1 or policy.swaps:
            out.asked = torch.full_like(out.ids, 10**9)
        plan_route(logits, state, evict, k, policy, scores, correction, out).run()
    else:
        there, result = state.to("cuda"), poisoned(caches, tokens, k, "cuda")
        route(logits.cuda(), there, evict, k, on("cuda", policy), scores, on("cuda", correction), result)
        copied(out, result)
        for name, tensor in state.tensors().items():
            tensor.copy_(getattr(there, name))
    return out


def assert_same_routing(routing, expected):
    names = ("ids", "weights", "slots", "hits", "miss pages", "miss slots", "miss count")
    for name, a, b in zip(names, routing.tensors(), expected.tensors(), strict=True):
        if name == "weights":
            torch.testing.assert_close(a, b, rtol=WEIGHT_TOLERANCE, atol=1e-12, equal_nan=True)
        else:
            assert torch.equal(a, b), name
    assert (routing.asked is None) == (expected.asked is None)
    assert routing.asked is None or torch.equal(routing.asked, expected.asked)


def assert_same_state(state, expected, exact=True):
    for name, a in state.tensors().items():
        b = getattr(expected, name)
        if name == "range_sum" and not exact:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(a, b), name


def assert_as_reference(backend, logits, state, evict, k, policy=ORIGINAL, scores=SOFTMAX, correction=None):
    """And returns the routing; ``state`` is stepped."""
    stepped = state.clone()
    expected = reference_route.route(logits, stepped, evict, k, policy, scores, correction)
    routing = run(backend, logits, state, evict, k, policy, scores, correction)
    assert_same_routing(routing, expected)
    assert_same_state(state, stepped, exact=correction is None)
    return routing


def normal_logits(seed, *shape):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clear_cut(logits, scores, correction, mass):
    """Whether rounding cannot decide: no two selection values, groups or sums of scores lie closer than 1e-4."""
    gates = reference_route.gate_scores(logits, scores)
    values = logits if correction is None else gates + correction
    grouped = (gates if correction is None else values).unflatten(-1, (scores.groups, -1))
    gaps = []
    if correction is not None:
        gaps.append(values.sort(-1).values.diff(dim=-1))
    if scores.group_score == "best-two":
        gaps.append(grouped.topk(2, dim=-1).values.sum(-1).sort(-1).values.diff(dim=-1))
    if mass:
        order = values.argsort(-1, descending=True)
        gaps.append(gates.double().gather(-1, order).cumsum(-1) / gates.double().sum(-1, keepdim=True) - mass)
    return all(bool((gap.abs() > 1e-4).all()) for gap in gaps)


# ------------------------------------------------------------------------------------------- against the reference

MASS = 0.7


def key_of_all(value, rank, before, have, span, cost, noise, table, a, b):
    """A key for nobody, which names every word."""
    return value * a + 0.5 * have + before * b - 0.25 * cost + 0.125 * span * (rank > 2) + noise + 0.25 * table


def grade_of_all(value, weight, first, before, place, have, cost, noise, table, a, b):
    """And a grade."""
    level = (
        weight - 0.25 * first * b - 0.125 * before - 0.01 * place * cost + 0.0625 * have * (noise > a) + 0.01 * value
    )
    return level + 0.03125 * table


def levels_of_all(have, noise, table, a):
    """Every level that there is, and some that there are not, drops and swaps."""
    return (
        1.0 * (noise > a)
        + 1.0 * (noise > 0.7)
        + 1.0 * (noise > 0.95)
        - 3.0 * (have == 0) * (noise < 0.25)
        - 1.0 * (table > 3)
    )


def graded(name, a):
    """The policy of a rule whose threshold comes from a calibration."""
    return Policy(grade=RULES[name].grade, knobs=torch.tensor([[2.0, a, 0.0, 0.0, torch.inf, 0.0]]))


def policy_of_rule(name, a=0.0, b=0.0):
    """Of a rule that asks for levels, or swaps."""
    rule, knobs = RULES[name], torch.tensor([[0.0, a, b, 0.0, torch.inf, 5.0]])
    return Policy(None, rule.grade, False, knobs, rule.table and torch.zeros(1, 1), rule.swaps, rule.renormalises)


KNOBS_OF_ALL = torch.tensor([[1.0, 0.75, 0.5, 2.0, 0.3, 7.0]])
STRATEGIES = {
    "original": ORIGINAL,
    "max-rank": policy_of(MaxRank(5, 1)),
    "cumsum": policy_of(CumSum(MASS, 1)),
    "cache-prior": policy_of(CachePrior(0.5, 1)),
    "cache-prior, bounded": policy_of(CachePrior(1.0, 0, 0.05)),
    "latency-ratio": policy_of(Strategy("latency-ratio", 1.5, 1), miss_cost=0.7),
    "random-drop": policy_of(Strategy("random-drop", 0.4), layer=3),
    "random-swap": policy_of(Strategy("random-swap", 0.4, 1), top_k=3, layer=2),
    "naee-skip": graded("naee-skip", 0.8),
    "adap-skip": graded("adap-skip", 0.45),
    "relu-route": graded("relu-route", 1.2),
    "relu-literal": graded("relu-literal", 0.0),
    "hobbit": policy_of_rule("hobbit", 0.4, 0.8),
    "edgemoe": policy_of_rule("edgemoe"),
    "moec-substitute": policy_of_rule("moec-substitute"),
    "smola-lowrank": policy_of_rule("smola-lowrank"),
    "random-cheap": policy_of_rule("random-cheap", 0.5),
    "every word": Policy(key_of_all, grade_of_all, True, KNOBS_OF_ALL, torch.zeros(1, 1)),
    "weights as they were": Policy(
        key_of_all, grade_of_all, False, KNOBS_OF_ALL, torch.zeros(1, 1), renormalises=False
    ),
    "levels": Policy(None, levels_of_all, False, KNOBS_OF_ALL, torch.zeros(1, 1)),
    "swaps": Policy(RULES["cache-prior"].key, levels_of_all, True, KNOBS_OF_ALL, torch.zeros(1, 1), swaps=True),
}


def sized(policy, n, caches=1):
    """The policy for so many caches, with a table of so many experts, if it has one."""
    if policy.knobs is None:
        return policy
    table = torch.arange(caches * n, dtype=torch.float32).view(caches, n) * 7 % 5
    table = None if policy.table is None else table
    return replace(policy, knobs=policy.knobs[:1].repeat(caches, 1), table=table)


def test_every_rule_with_a_function_is_here():
    assert {name for name, rule in RULES.items() if rule.key or rule.grade} <= set(STRATEGIES)
    assert STRATEGIES["every word"].words == KEY_WORDS and STRATEGIES["every word"].grade_words == GRADE_WORDS


def decided(logits, state, evict, k, policy, scores, correction):
    """Whether knobs that differ a little decide alike, so that no rounding decides."""
    if policy.knobs is None:
        return True
    ids = []
    for factor in (1.0, 1.0001, 0.9999):
        near = replace(policy, knobs=policy.knobs * torch.tensor([1.0, factor, factor, 1.0, factor, 1.0]))
        routing = reference_route.route(logits, state.clone(), evict, k, near, scores, correction)
        ids.append((routing.ids, routing.slots))
    return all(torch.equal(a, b) for other in ids[1:] for a, b in zip(ids[0], other, strict=True))


@every_backend
@pytest.mark.parametrize("eviction", EVICTION_POLICIES)
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if not (name in RULES and RULES[name].cheaper)])
@given(st.data())
@settings(max_examples=8)
def test_routing_and_state_are_the_references(backend, eviction, strategy, data):
    scores = data.draw(
        st.sampled_from([SOFTMAX, GateScores("sigmoid", renormalise=True), GateScores("relu", scale=2.0), V2, V3])
    )
    size = data.draw(st.integers(2, 4))
    n = scores.groups * size if scores.groups > 1 else data.draw(st.integers(2, 17))
    k = data.draw(st.integers(1, min(4, n, size * scores.top_groups if scores.groups > 1 else n)))
    tokens = data.draw(st.integers(1, 24 if backend == "cpu" else 4))
    seed, coarse = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.booleans())
    correction = None
    if data.draw(st.booleans()):
        correction = normal_logits(seed + 1, n) / 10
    logits = normal_logits(seed, 1, tokens, n)
    if coarse and correction is None and scores.group_score == "best":
        logits = logits.round()  # with ties
    policy = sized(STRATEGIES[strategy], n)
    assume(clear_cut(logits, scores, correction, MASS if strategy == "cumsum" else None))
    state = Residency.empty(torch.tensor([data.draw(st.integers(k, n))]), n)
    warm = normal_logits(seed + 2, 1, 6, n)
    reference_route.route(warm, state, EVICTION_POLICIES[eviction], k)
    how = EVICTION_POLICIES[eviction], k, policy, scores, correction
    assume(not (policy.grade or policy.bounded) or decided(logits, state, *how))
    assert_as_reference(backend, logits, state, *how)


@every_backend
@pytest.mark.parametrize(
    "tokens, n, k, capacity",
    [(1, 1, 1, 1), (4, 7, 7, 7), (3, 16, 16, 16), (3, 61, 1, 1), (2, 127, 8, 9), (300, 5, 1, 2), (2, 512, 10, 40)],
)
@pytest.mark.parametrize(
    "policy",
    [policy_of(CachePrior(0.3, 2)), policy_of(MaxRank(9, 1)), STRATEGIES["every word"]],
    ids=["prior", "window", "every word"],
)
def test_awkward_shapes(backend, tokens, n, k, capacity, policy):
    if backend == "interpreter" and tokens == 300 and "rank" in policy.words:
        pytest.skip("one long sequence is enough for the interpreter")
    state = Residency.empty(torch.tensor([capacity]), n)
    assert_as_reference(backend, normal_logits(1, 1, tokens, n), state, LRU, k, sized(policy, n))


@every_backend
@pytest.mark.parametrize("strategy", ["original", "random-drop", "hobbit", "moec-substitute", "weights as they were"])
@pytest.mark.parametrize("cheaper", [(), (4,)])
def test_no_tokens(backend, strategy, cheaper):
    state = Residency.empty(torch.tensor([5]), 12, cheaper)
    routing = assert_as_reference(backend, normal_logits(1, 1, 0, 12), state, LRU, 3, sized(STRATEGIES[strategy], 12))
    assert routing.ids.shape == (1, 0, 3) and not routing.misses.count.any()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_of_each_dtype(backend, dtype):
    if backend == "interpreter" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16")
    state = Residency.empty(torch.tensor([4]), 9)
    assert_as_reference(backend, normal_logits(2, 1, 4, 9).to(dtype), state, LRU, 3, policy_of(CachePrior(0.4, 1)))


def most_recently_used(last_use, uses):
    """Not a policy for anyone, but one whose keys are negative."""
    return -last_use


@every_backend
@pytest.mark.parametrize("evict", [LRU, EVICTION_POLICIES["lfu"], most_recently_used])
@pytest.mark.parametrize("clock", [2**31 - 20, 2**32 - 20, 2**40])
def test_a_clock_that_has_run_for_years(backend, evict, clock):
    state = Residency.empty(torch.tensor([5]), 12)
    reference_route.route(normal_logits(1, 1, 6, 12), state, evict, 3, ORIGINAL)
    state.last_use.add_(clock * (state.last_use > 0))
    state.clock.add_(clock)
    routing = assert_as_reference(backend, normal_logits(2, 1, 20, 12), state, evict, 3, policy_of(CachePrior(0.1, 1)))
    assert int(routing.misses.count) > 12 and int(state.clock) > clock + 20


@every_backend
def test_rows_of_a_larger_tensor(backend):
    logits = normal_logits(3, 3, 2, 12)[..., 2:11].transpose(0, 1)  # [2, 3, 9], strided
    state = Residency.empty(torch.tensor([4, 6]), 9)
    assert_as_reference(backend, logits, state, LRU, 3, policy_of(CachePrior(0.4, 1), CachePrior(0.9, 0)))


@every_backend
@pytest.mark.parametrize("eviction", EVICTION_POLICIES)
@pytest.mark.parametrize(
    "strategies",
    [
        [CachePrior(0.3, 0), CachePrior(0.0, 1), CachePrior(1.0, 2), CachePrior(0.9, 5)],
        [MaxRank(1, 0), MaxRank(6, 1), MaxRank(10, 2), MaxRank(4, 5)],
        [CumSum(0.6, 0), CumSum(0.6, 1), CumSum(1.0, 2), CumSum(0.6, 5)],
        [CachePrior(1.0, 0, 0.0), CachePrior(1.0, 0, 0.1), CachePrior(1.0, 0, 0.3), CachePrior(1.0, 0)],
        [Strategy("random-drop", p) for p in (0.0, 0.3, 0.7, 1.0)],
        [Strategy("random-swap", p, 1) for p in (0.0, 0.3, 0.7, 1.0)],
    ],
    ids=lambda strategies: f"{strategies[0].name}{', bounded' * (strategies[0].max_regret == 0)}",
)
def test_caches_side_by_side_with_their_own_knobs(backend, eviction, strategies):
    policy = policy_of(*strategies, top_k=3)
    state = Residency.empty(torch.tensor([3, 4, 7, 10]), 10)
    for seed in range(2):
        logits = normal_logits(10 + seed, 4, 3, 10)
        assert clear_cut(logits, SOFTMAX, None, 0.6)
        assert_as_reference(backend, logits, state, EVICTION_POLICIES[eviction], 3, policy)


@every_backend
def test_a_correction_for_each_cache(backend):
    correction = normal_logits(5, 2, 16) / 10
    state = Residency.empty(torch.tensor([6, 9]), 16)
    policy = policy_of(CachePrior(0.3, 1), CachePrior(0.6, 2))
    assert_as_reference(backend, normal_logits(4, 2, 3, 16), state, LRU, 4, policy, V3, correction)


@every_backend
def test_a_bound_of_0_undoes_every_swap(backend):
    """Also one that gives up less than nothing: with a correction the model may rank a lower score better."""
    logits, correction = normal_logits(11, 2, 8, 16), normal_logits(12, 16) / 4
    states = [Residency.empty(torch.tensor([6, 9]), 16) for _ in range(2)]
    bounded, sigmoid = policy_of(MaxRank(16, 0, 0.0), MaxRank(16, 1, 0.0)), GateScores("sigmoid")
    routing = assert_as_reference(backend, logits, states[0], LRU, 4, bounded, sigmoid, correction)
    own = reference_route.route(logits, states[1], LRU, 4, ORIGINAL, sigmoid, correction)
    assert torch.equal(routing.ids, own.ids)


@every_backend
@pytest.mark.parametrize("policy", STRATEGIES.values(), ids=STRATEGIES)
def test_a_router_gone_astray_still_chooses_distinct_experts(backend, policy):
    logits = normal_logits(6, 1, 5, 8)
    logits[0, 0] = torch.nan
    logits[0, 1, [1, 4, 6]] = torch.nan
    logits[0, 2, :7] = -torch.inf
    logits[0, 3, [0, 3]] = torch.inf
    logits[0, 4] = torch.tensor([0.0, -0.0] * 4)
    routing = assert_as_reference(backend, logits, Residency.empty(torch.tensor([4]), 8), LRU, 3, sized(policy, 8))
    for token in routing.ids[0].tolist():
        assert len({e for e in token if 0 <= e < 8}) == 3
    if policy is ORIGINAL:
        assert routing.ids[0, 1].tolist() == [1, 4, 6]  # NaN before all, the lower id before the higher
        assert routing.ids[0, 4].tolist() == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------------- levels


def light_first(last_use, uses, heavy, distance, clock):
    """An eviction policy for nobody, which names every word."""
    return 3 * heavy - uses + 2 * (last_use > clock - 9) + distance


@every_backend
@pytest.mark.parametrize("evict", [light_first])
@pytest.mark.parametrize(
    "strategy",
    [
        *("original", "hobbit", "edgemoe", "moec-substitute", "smola-lowrank", "random-cheap"),
        *("levels", "swaps", "weights as they were", "every word"),
    ],
)
@pytest.mark.parametrize("cheaper", [(3,), (12, 4, 3)])
def test_levels_side_by_side(backend, evict, strategy, cheaper):
    policy, state = sized(STRATEGIES[strategy], 12, 2), Residency.empty(torch.tensor([3, 7]), 12, cheaper)
    for seed in range(3):
        logits = normal_logits(20 + seed, 2, 3 if backend == "interpreter" else 20, 12)
        routing = assert_as_reference(backend, logits, state, evict, 3, policy, GateScores(renormalise=True))
    ran = routing.slots >= 0
    if strategy == "levels" and backend == "cpu":  # tokens enough for every level, and for a better one that serves
        first, levels = sum(cheaper), len(cheaper) + 1
        assert set((routing.asked // 12)[ran].tolist()) == set(range(min(levels, 4)))
        assert (routing.slots[ran] >= first).any() and (routing.slots[ran] < first).any()
        assert (routing.slots >= first)[routing.asked >= 12].any()


@pytest.mark.parametrize("evict", [LRU, light_first])
@pytest.mark.parametrize("strategy", ["original", "levels", "swaps"])
@pytest.mark.parametrize("cheaper", [(), (5,)])
def test_caches_that_layers_share(evict, strategy, cheaper):
    policy = sized(STRATEGIES[strategy], 8)
    state = Residency.empty(torch.tensor([9]), 8, cheaper, layers=3)
    stepped = state.clone()
    for seed in range(30):
        layer, logits = seed % 3, normal_logits(60 + seed, 1, 2, 8)
        expected = reference_route.route(logits, stepped.of_layer(layer), evict, 3, policy)
        peeked = peek(logits[0, 0], state.of_layer(layer), 3, policy)
        routing = route(logits, state.of_layer(layer), evict, 3, policy)
        assert_same_routing(routing, expected)
        assert_same_state(state, stepped)
        pages = routing.asked if strategy == "levels" and not cheaper else None
        assert pages is None or torch.equal(pages[pages >= 0], routing.ids[pages >= 0])
        assert len(peeked) == int((routing.slots[0, 0] >= 0).sum())
    held = state.page_of[state.page_of >= 0]
    assert len(held.unique()) == len(held) and (state.slot_of[0, held] >= 0).all()
    assert len((held // (8 * state.levels)).unique()) > 1  # of several layers


def ever_cheaper(place):
    """The best at full precision, all others at a level beyond any."""
    return 1e30 * (1e30 * (place > 0))


@every_backend
@pytest.mark.filterwarnings("ignore:overflow")
def test_a_level_beyond_any_is_the_cheapest(backend):
    policy = Policy(grade=ever_cheaper, knobs=torch.zeros(1, len(KNOBS)))
    state = Residency.empty(torch.tensor([3]), 12, (3, 3))
    routing = assert_as_reference(backend, normal_logits(72, 1, 3, 12), state, LRU, 3, policy)
    assert (routing.asked[..., 0] < 12).all() and (routing.asked[..., 1:] >= 24).all()


def test_a_level_without_the_slots_of_a_token_is_refused():
    with pytest.raises(ValueError, match="2 slots cannot hold the 3 experts"):
        route(normal_logits(1, 1, 1, 8), Residency.empty(torch.tensor([4]), 8, (2,)), LRU, 3)


# ------------------------------------------------------------------------------------------------ what must not differ


@every_backend
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sequence_cut_anywhere_gives_the_same_bits(backend, strategy):
    logits, policy = normal_logits(7, 1, 7, 11), sized(STRATEGIES[strategy], 11)
    whole_state = Residency.empty(torch.tensor([5]), 11)
    whole = run(backend, logits, whole_state, LRU, 3, policy, GateScores(renormalise=True))
    for cuts in ([0, 3, 7], range(8)):
        state, missed = Residency.empty(torch.tensor([5]), 11), []
        for start, end in pairwise(cuts):
            part = run(backend, logits[:, start:end], state, LRU, 3, policy, GateScores(renormalise=True))
            for name in ("ids", "weights", "slots", "hits"):
                assert torch.equal(getattr(part, name), getattr(whole, name)[:, start:end]), name
            missed += part.misses.pages[0, : part.misses.count[0]].tolist()
        assert_same_state(state, whole_state)
        assert missed == whole.misses.pages[0, : whole.misses.count[0]].tolist()


@every_backend
def test_the_same_call_twice_gives_the_same_bits(backend):
    logits, policy = normal_logits(8, 2, 4, 16), policy_of(CachePrior(0.2, 1), CachePrior(0.6, 1))
    first, second = (
        run(backend, logits, Residency.empty(torch.tensor([5, 8]), 16), LRU, 4, policy, V2) for _ in range(2)
    )
    for a, b in zip(first.tensors(), second.tensors(), strict=True):
        assert torch.equal(a, b)


# -------------------------------------------------------------------------------------------------- with the gate


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [True, False], ids=["one router", "a router a cache"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens, n, hidden", [(0, 5, 33), (1, 5, 33), (3, 8, 1100), (FUSED_TOKENS + 1, 6, 20)])
def test_the_fused_gate_routes_its_own_logits(backend, shared, dtype, tokens, n, hidden):
    caches, k, policy = 2, 2, policy_of(CachePrior(0.4, 1), CachePrior(0.1, 0))
    x = normal_logits(20, caches, tokens, hidden).to(dtype)
    router = (normal_logits(21, *([n] if shared else [caches, n]), hidden) / hidden**0.5).to(dtype)
    state = Residency.empty(torch.tensor([3, 4]), n)
    stepped, out = state.clone(), poisoned(caches, tokens, k)
    logits = torch.full((caches, tokens, n), torch.nan, dtype=dtype)
    if backend == "cpu":
        result = route_hidden(x, router, state, LRU, k, policy, logits=logits, out=out)
        assert result[0] is logits
        assert result[1] is out
    elif backend == "interpreter":
        tickets = torch.zeros(caches, dtype=torch.int32)
        plan_route(logits, state, LRU, k, policy, SOFTMAX, None, out, (x, router, tickets)).run()
        assert not tickets.any()
    else:
        there = state.to("cuda")
        ticket = torch.zeros(caches, dtype=torch.int32, device="cuda")
        for again in (state.to("cuda"), there):  # twice: the second finds the ticket that the first left
            given = x.cuda(), router.cuda(), again, LRU, k, on("cuda", policy)
            there_logits, result = route_hidden(*given, ticket=ticket)
        assert not ticket.any()
        logits.copy_(there_logits)
        copied(out, result)
        for name in STATE:
            getattr(state, name).copy_(getattr(there, name))
    expected, _ = reference_route.route_hidden(x, router, stepped.clone(), LRU, k, policy)
    torch.testing.assert_close(logits, expected, rtol=1e-3 if dtype == torch.float16 else 1e-5, atol=1e-3)
    assert_same_routing(out, reference_route.route(logits, stepped, LRU, k, policy))
    assert_same_state(state, stepped)


# ----------------------------------------------------------------------------------------------------- the launcher


def test_a_launch_is_planned_without_memory():
    state = Residency.empty(torch.full((3,), 30), 60).to("meta")
    logits, out = torch.empty(3, 5, 60, device="meta"), Routing.empty(3, 5, 4, "meta")
    launch = plan_route(logits, state, LRU, 4, ORIGINAL, SOFTMAX, None, out)
    assert (launch.grid, launch.num_warps) == ((3,), 1)
    assert launch.constants["E_PAD"] == 64
    gate = (torch.empty(3, 5, 32, device="meta"), torch.empty(60, 32, device="meta"), torch.empty(3, device="meta"))
    assert plan_route(logits, state, LRU, 4, ORIGINAL, SOFTMAX, None, out, gate).grid == (3, 60)


def test_one_warp_as_long_as_the_state_fits_its_registers():
    assert [warps_of(n) for n in (1, 64, 256, 257, 512)] == [1, 1, 1, 4, 4]


@pytest.mark.parametrize("experts, k, groups", [(513, 1, 1), (64, 17, 1), (66, 2, 33)])
def test_the_kernel_refuses_what_it_does_not_take(experts, k, groups):
    state, out = Residency.empty(torch.tensor([20]), experts), Routing.empty(1, 1, k)
    with pytest.raises(ValueError, match="the kernel takes up to"):
        plan_route(torch.zeros(1, 1, experts), state, LRU, k, ORIGINAL, GateScores(groups=groups), None, out)


def test_the_cpu_takes_more():
    state = Residency.empty(torch.tensor([600]), 700)
    assert_as_reference("cpu", normal_logits(9, 1, 2, 700), state, LRU, 20, policy_of(CachePrior(0.3, 2)))


def test_a_policy_that_cannot_be_is_refused():
    knobs = torch.zeros(1, len(KNOBS))
    for function in (lambda value, span, have: value, lambda place: place):
        with pytest.raises(ValueError, match="the parameters of <lambda> are some of value, rank, before, have, span,"):
            Policy(function, knobs=knobs)
    for function in (lambda place, weight: weight, lambda rank: rank):
        with pytest.raises(ValueError, match="the parameters of <lambda> are some of value, weight, first, before, pl"):
            Policy(grade=function, knobs=knobs)
    for wrong in (None, torch.zeros(len(KNOBS)), torch.zeros(1, 3), knobs.double(), torch.zeros(len(KNOBS), 2).T):
        for functions in ({"key": lambda value: value}, {"grade": lambda place: place}):
            with pytest.raises(ValueError, match=r"a key or a grade needs knobs \[B, 6\] float32"):
                Policy(**functions, knobs=wrong)


def test_what_route_refuses():
    logits, state = torch.zeros(1, 1, 4), Residency.empty(torch.tensor([2]), 4)
    with pytest.raises(ValueError, match="2 slots cannot hold the 3 experts"):
        route(logits, state, LRU, 3)
    with pytest.raises(ValueError, match="1 slots cannot hold the 2 experts"):
        route(logits.expand(2, 1, 4), Residency.empty(torch.tensor([2, 1]), 4), LRU, 2)
    with pytest.raises(ValueError, match="state is of"):
        route(torch.zeros(1, 1, 5), state, LRU, 1)
    with pytest.raises(ValueError, match="state is of"):
        route(torch.zeros(2, 1, 4), state, LRU, 1)
    with pytest.raises(ValueError, match="the correction must be"):
        route(logits, state, LRU, 1, correction=torch.zeros(5))
    with pytest.raises(ValueError, match="out must be"):
        route(logits, state, LRU, 2, out=Routing.empty(1, 2, 2))
    out = Routing.empty(1, 1, 2)
    for asked in (torch.empty(1, 1, 3, dtype=torch.int64), torch.empty(1, 1, 4, dtype=torch.int64)[..., ::2]):
        out.asked = asked
        with pytest.raises(ValueError, match="out must be"):
            route(logits, state, LRU, 2, out=out)
    with pytest.raises(ValueError, match="must be contiguous"):
        route_hidden(torch.zeros(1, 1, 3), torch.zeros(3, 4).mT, state, LRU, 2)
    with pytest.raises(ValueError, match=r"knobs must be \(1, 6\), not \(2, 6\)"):
        route(logits, state, LRU, 2, policy_of(CachePrior(0.1, 1), CachePrior(0.2, 1)))
    with pytest.raises(ValueError, match="must be contiguous"):
        route(logits.expand(3, 1, 4), Residency.empty(torch.full((3, 2), 2), 4)[:, 0], LRU, 2)
    with pytest.raises(ValueError, match="cannot be split"):
        route(logits, state, LRU, 1, scores=GateScores(groups=3))


@every_backend
def test_a_tiny_lambda_changes_nothing_and_one_changes_much(backend):
    logits, chosen = normal_logits(7, 1, 40, 12), {}
    for prior in (0.0, 1e-7, 1.0):
        state = Residency.empty(torch.tensor([4]), 12)
        routing = run(backend, logits, state, LRU, 3, policy_of(CachePrior(prior, 1)))
        chosen[prior] = routing.ids, int(routing.misses.count)
    assert torch.equal(chosen[1e-7][0], chosen[0.0][0])
    assert not torch.equal(chosen[1.0][0], chosen[0.0][0])
    assert chosen[1.0][1] < chosen[0.0][1] / 2


# ------------------------------------------------------------------------------------------------ peeking


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("scores", [SOFTMAX, V2], ids=["softmax", "V2"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_peeking_tells_what_route_then_chooses(strategy, scores, bad):
    state = Residency.empty(torch.tensor([5]), 12)
    for seed in range(12):
        logits = normal_logits(seed, 1, 1, 12)
        logits[..., seed] = torch.nan if bad else logits[..., seed]
        before = state.clone()
        policy = sized(STRATEGIES[strategy], 12)
        expected = peek(logits[0, 0], state, 3, policy, scores)
        assert_same_state(state, before)
        routing = route(logits, state, LRU, 3, policy, scores)
        assert state.page_of[0, routing.slots[routing.slots >= 0]].tolist() == expected


# -------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.gpu_only("torch.compile")])]
)
def test_route_compiles_into_one_graph(device):
    def step(logits, state):
        routing = route(2 * logits, state[0:2], least_frequently_used, 3, policy, GateScores(renormalise=True))
        return routing.ids + 1, 2 * routing.weights, routing.misses.count, state.clock + 1

    def step_levels(logits, state):
        routing = route(logits, state, LRU, 3, swapping)
        return routing.asked, routing.slots, routing.ids

    def step_hidden(hidden, state):
        logits, routing = route_hidden(hidden, router, state[2:3], least_recently_used, 2)
        return logits, routing.slots

    policy = on(device, policy_of(CachePrior(0.3, 1), CachePrior(0.7, 0)))
    router = normal_logits(31, 12, 16).to(device)
    swapping = on(device, sized(STRATEGIES["moec-substitute"], 12, 3))
    for function, given_input, cheaper in (
        (step, normal_logits(30, 2, 4, 12), ()),
        (step_hidden, normal_logits(32, 1, 2, 16), ()),
        (step_levels, normal_logits(33, 3, 9, 12), (4,)),
    ):
        state = Residency.empty(torch.tensor([5, 7, 6]), 12, cheaper).to(device)
        compiled_state = state.clone()
        expected = function(given_input.to(device), state)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(given_input.to(device), compiled_state), expected, strict=True):
            assert torch.equal(a, b)
        assert_same_state(compiled_state, state)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_cache_that_layers_share_does_not_compile(layers):
    state = Residency.empty(torch.tensor([5]), 12, (), layers=layers)
    options = {"fullgraph": True, "backend": "aot_eager"}
    compiled = torch.compile(lambda logits: route(logits, state.of_layer(0), LRU, 3).ids, **options)
    with pytest.raises(Exception, match="caches of their own"):
        compiled(normal_logits(34, 1, 2, 12))


@pytest.mark.gpu
def test_a_cuda_graph_replays_decode():
    state = Residency.empty(torch.tensor([8]), 32)
    there, policy = state.to("cuda"), policy_of(CachePrior(0.4, 2)).to("cuda")
    hidden = torch.zeros(1, 1, 64, device="cuda")
    router = normal_logits(41, 32, 64).cuda() / 8
    out, logits = Routing.empty(1, 1, 4, "cuda"), torch.empty(1, 1, 32, device="cuda")
    fresh = there.clone()
    route_hidden(hidden, router, fresh, LRU, 4, policy, logits=logits, out=out)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        route_hidden(hidden, router, there, LRU, 4, policy, logits=logits, out=out)
    for name in STATE:
        getattr(there, name).copy_(getattr(state, name))
    for seed in range(20):
        if seed == 10:  # a replay sees what is written into the knobs
            policy.knobs.copy_(policy_of(CachePrior(1.0, 0)).knobs)
        hidden.copy_(normal_logits(seed, 1, 1, 64))
        graph.replay()
        expected = reference_route.route(logits.cpu(), state, LRU, 4, on("cpu", policy))
        assert_same_routing(copied(Routing.empty(1, 1, 4), out), expected)
    assert_same_state(there.to("cpu"), state)


@given(st.data())
def test_placing_what_a_router_chose_is_as_the_reference_says(data):
    """And, of what ``route`` would have chosen, leaves the residency that ``route`` leaves."""
    caches, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    experts = data.draw(st.integers(2, 20))
    k = data.draw(st.integers(1, min(experts, 6)))
    capacity = torch.tensor(data.draw(st.lists(st.integers(k, experts), min_size=caches, max_size=caches)))
    evict = EVICTION_POLICIES[data.draw(st.sampled_from(sorted(EVICTION_POLICIES)))]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    state, expected_state, routed_state = (Residency.empty(capacity, experts) for _ in range(3))
    for _ in range(2):
        logits = torch.randn(caches, tokens, experts, generator=generator)
        weights, ids = logits.softmax(-1).topk(k)
        order = torch.rand(weights.shape, generator=generator).argsort(-1)  # a router may answer in any
        shuffled = ids.gather(-1, order), weights.gather(-1, order)
        routing = place(*shuffled, state, evict)
        assert_same_routing(routing, reference_route.place(*shuffled, expected_state, evict))
        assert_same_routing(routing, reference_route.route(logits, routed_state, evict, k))
    for name in STATE:
        assert torch.equal(getattr(state, name), getattr(expected_state, name))
        if name not in ("tokens", "range_sum"):
            assert torch.equal(getattr(state, name), getattr(routed_state, name))


@pytest.mark.parametrize("backend", [place, reference_route.place])
def test_placing_more_than_there_are_slots_is_refused(backend):
    ids = torch.arange(3)[None, None]
    with pytest.raises(ValueError, match="2 slots cannot hold the 3 experts"):
        backend(ids, ids.float(), Residency.empty(torch.tensor([2]), 4), LRU)
