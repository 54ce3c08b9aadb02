"""The reference kernels against the paper's rules, written out literally in plain Python."""

import math
from dataclasses import fields
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from cachemoe.kernels.experts_cpu import side_by_side
from cachemoe.kernels.formats import PageFormat
from cachemoe.kernels.policy import ORIGINAL
from cachemoe.kernels.quantize import dequantize_groups, quantize_groups
from cachemoe.kernels.reference_experts import experts
from cachemoe.kernels.reference_route import route
from cachemoe.kernels.state import SOFTMAX, STATE, GateScores, Residency
from cachemoe.moe.strategies import CachePrior, CumSum, MaxRank, Strategy, policy_of
from cachemoe.offload.residency import EVICTION_POLICIES

# ---------------------------------------------------------------------------------------------- the literal rules


def softmax(z):
    powers = [math.exp(float(x - max(z))) for x in z]
    return [power / sum(powers) for power in powers]


def by_logit(z):
    """Experts, best first; ties go to the lower id."""
    return sorted(range(len(z)), key=lambda e: (-z[e], e))


def gates_of(z, function):
    if function == "softmax":
        return softmax(z)
    return [1 / (1 + math.exp(-float(x))) if function == "sigmoid" else max(float(x), 0.0) for x in z]


def values_of(z, scores, correction):
    """What experts are ranked by, and minus infinity outside the groups that the token may choose from."""
    gates = gates_of(z, scores.function)
    corrected = gates if correction is None else [a + b for a, b in zip(gates, correction, strict=True)]
    values = z if correction is None else corrected
    size = len(z) // scores.groups
    groups = [range(first, first + size) for first in range(0, len(z), size)]
    if scores.group_score == "best":
        worth = [max(values[e] for e in group) for group in groups]
    else:
        worth = [sum(sorted(corrected[e] for e in group)[-2:]) for group in groups]
    best = sorted(range(len(groups)), key=lambda g: (-worth[g], g))[: scores.top_groups]
    return values, [x if e // size in best else -math.inf for e, x in enumerate(values)]


def fewest(z, p, shares):
    """M: how many of the best experts it takes for their shares of the scores to sum to p."""
    total = 0.0
    for m, e in enumerate(by_logit(z), start=1):
        total += shares[e]
        if total >= p:
            return m
    return len(z)


def select(z, resident, k, rule, value, top_j, mean_range, shares):
    """The paper's algorithms for one token; K experts, the highest value first."""
    ranked = by_logit(z)
    resident = [e for e in range(len(z)) if e in resident and z[e] > -math.inf]
    kept, rest = ranked[:top_j], ranked[top_j:]
    if rule == "original":
        wanted = ranked
    elif rule == "cache-prior":
        biased = [z[e] + value * mean_range * (e in resident) for e in range(len(z))]
        wanted = kept + sorted(rest, key=lambda e: (-biased[e], e))
    else:
        window = ranked[: value if rule == "max-rank" else fewest(z, value, shares)]
        promoted = [e for e in rest if e in window and e in resident]
        wanted = kept + promoted + [e for e in rest if e not in promoted]
    return sorted(wanted[:k], key=ranked.index)


class LiteralCache:
    """One cache: what is in each slot, when and how often each expert was touched."""

    def __init__(self, capacity, eviction):
        self.slots = [None] * capacity
        self.eviction = eviction
        self.clock = 0
        self.last_use = {}
        self.uses = {}
        self.ranges = []

    def mean_range(self):
        return sum(self.ranges) / Fraction(len(self.ranges)) if self.ranges else 0

    def leaves_first(self, e):
        return self.last_use[e] if self.eviction == "lru" else (self.uses[e], self.last_use[e])

    def step(self, chosen):
        """Touch the chosen, lowest gate weight first, and place those absent, highest first. Gives slots and hits."""
        hits = [e in self.slots for e in chosen]
        for e in reversed(chosen):
            self.clock += 1
            self.last_use[e] = self.clock
            self.uses[e] = self.uses.get(e, 0) + 1
        for e in chosen:
            if e not in self.slots:
                leaving = None
                if None not in self.slots:
                    leaving = min((other for other in self.slots if other not in chosen), key=self.leaves_first)
                self.slots[self.slots.index(leaving)] = e
        return [self.slots.index(e) for e in chosen], hits


def literal_route(logits, cache, k, rule, value, top_j, scores, correction=None):
    """A dict of what ``Routing`` has, as lists."""
    out = {name: [] for name in ("ids", "weights", "slots", "hits", "misses")}
    for z in logits:
        gates = gates_of(z, scores.function)
        values, ranked_by = values_of(z, scores, correction)
        shares = [gate / (sum(gates) or 1.0) for gate in gates]
        chosen = select(ranked_by, cache.slots, k, rule, value, top_j, cache.mean_range(), shares)
        cache.ranges.append(max(values) - min(values))
        token_slots, token_hits = cache.step(chosen)
        weights = [gates[e] for e in chosen]
        total = sum(weights) + scores.epsilon if scores.renormalise else 1.0
        out["ids"].append(chosen)
        out["weights"].append([scores.scale * weight / total for weight in weights])
        out["slots"].append(token_slots)
        out["hits"].append(token_hits)
        out["misses"] += [(e, s) for e, s, hit in zip(chosen, token_slots, token_hits, strict=True) if not hit]
    return out


# -------------------------------------------------------------------------------------------------- drawing cases


@st.composite
def shapes(draw):
    """(experts, top_k, top_j, capacity)"""
    n = draw(st.integers(2, 10))
    k = draw(st.integers(1, min(4, n)))
    return n, k, draw(st.integers(0, k)), draw(st.integers(k, n))


def coarse_logits(tokens, n):
    """From few multiples of 1/4, so that ties are common and sums are exact in float32."""
    token = st.lists(st.integers(-4, 4).map(lambda i: Fraction(i, 4)), min_size=n, max_size=n)
    return st.lists(token, min_size=1, max_size=tokens)


def rules_by_name(n):
    # Powers of two, for which the float32 arithmetic of cache-prior is exact wherever two scores tie.
    lambdas = st.sampled_from([Fraction(0), Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(1)])
    values = {
        "original": st.none(),
        "max-rank": st.integers(1, n),
        "cumsum": st.floats(0.05, 0.99),
        "cache-prior": lambdas,
    }
    return {name: st.tuples(st.just(name), value) for name, value in values.items()}


def rules(n):
    return st.one_of(*rules_by_name(n).values())


def policy_for(rule, value, top_j):
    return policy_of(Strategy(rule, value and float(value), top_j))


def away_from_boundary(logits, rule, p, scores=SOFTMAX, correction=None):
    """Not where float32 may fall on the other side of a sum or of another value than float64."""
    for z in logits:
        gates, (_, ranked_by) = gates_of(z, scores.function), values_of(z, scores, correction)
        total = 0.0
        for e in by_logit(ranked_by):
            total += gates[e] / (sum(gates) or 1.0)
            if rule == "cumsum" and abs(total - p) < 1e-4:
                return False
        if correction is not None or scores.group_score == "best-two":
            corrected = sorted(a + b for a, b in zip(gates, correction or [0.0] * len(z), strict=True))
            if any(b - a < 1e-4 for a, b in pairwise(corrected)):
                return False
    return True


def as_tensor(logits):
    return torch.tensor([[[float(x) for x in z] for z in logits]])


def normal_logits(seed, *shape):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def empty(capacity, n):
    return Residency.empty(torch.tensor([capacity]), n)


def holding(resident, n, ranges):
    """A cache with room for all experts, some of them resident, that has seen tokens of these logit ranges."""
    state = empty(n, n)
    for e in resident:
        state.slot_of[0, e] = state.page_of[0, e] = e
    state.tokens.add_(len(ranges))
    state.range_sum.add_(sum(ranges))
    return state


def assert_same_state(a, b):
    for name, tensor in a.tensors().items():
        assert torch.equal(tensor, getattr(b, name)), name


def assert_same_routing(a, b):
    for name in ("ids", "weights", "slots", "hits"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


RENORMALISED = GateScores(renormalise=True)


def assert_as_written(routing, expected):
    for name in ("ids", "slots", "hits"):
        assert getattr(routing, name)[0].tolist() == expected[name], name
    torch.testing.assert_close(routing.weights[0], torch.tensor(expected["weights"]), rtol=1e-5, atol=1e-7)
    experts, slots, (count,) = (
        routing.misses.pages[0].tolist(),
        routing.misses.slots[0].tolist(),
        routing.misses.count,
    )
    assert list(zip(experts, slots, strict=True))[:count] == expected["misses"]
    assert {*experts[count:], *slots[count:]} <= {-1}
    assert count == len(expected["misses"])


SEEDS = st.integers(0, 2**32 - 1)

each_eviction = pytest.mark.parametrize("eviction", ["lru", "lfu"])

# ------------------------------------------------------------------------------------------- the rules, literally


@each_eviction
@given(st.data())
def test_route_follows_the_papers_rules(eviction, data):
    n, k, top_j, capacity = data.draw(shapes())
    logits = data.draw(coarse_logits(12, n))
    (rule, value), renormalise = data.draw(rules(n)), data.draw(st.booleans())
    assume(away_from_boundary(logits, rule, value))
    cache, state = LiteralCache(capacity, eviction), empty(capacity, n)

    scores, policy = GateScores(renormalise=renormalise), policy_for(rule, value, top_j)
    expected = literal_route(logits, cache, k, rule, value, top_j, scores)
    routing = route(as_tensor(logits), state, EVICTION_POLICIES[eviction], k, policy, scores)

    assert_as_written(routing, expected)
    assert state.page_of[0].tolist() == [-1 if e is None else e for e in cache.slots]
    assert state.slot_of[0].tolist() == [cache.slots.index(e) if e in cache.slots else -1 for e in range(n)]
    assert state.last_use[0].tolist() == [cache.last_use.get(e, 0) for e in range(n)]
    assert state.uses[0].tolist() == [cache.uses.get(e, 0) for e in range(n)]
    assert (state.clock.item(), state.tokens.item()) == (cache.clock, len(logits))
    assert state.range_sum.item() == sum(cache.ranges)


@each_eviction
@pytest.mark.parametrize("rule, value", [("max-rank", 9), ("cumsum", 0.8), ("cache-prior", Fraction(0.3))])
def test_route_follows_the_papers_rules_over_a_long_sequence(eviction, rule, value):
    logits = normal_logits(5, 1, 400, 16)
    cache = LiteralCache(6, eviction)
    exact = [[Fraction(x) for x in z] for z in logits[0].tolist()]
    expected = literal_route(exact, cache, 4, rule, value, 1, SOFTMAX)
    routing = route(logits, empty(6, 16), EVICTION_POLICIES[eviction], 4, policy_for(rule, value, 1))
    for t in range(400):  # pytest takes minutes to explain how two long lists differ
        for name in ("ids", "slots", "hits"):
            assert getattr(routing, name)[0, t].tolist() == expected[name][t], f"{name} of token {t}"


def test_cache_prior_averages_the_logit_range_over_past_tokens_only():
    logits = torch.tensor([[[4.0, 3.0, 1.0, 0.0]]])  # expert 3 comes before expert 1 where delta is above 3
    policy = policy_of(CachePrior(1.0, 1))
    for past, expected in (([], [0, 1]), ([2.0], [0, 1]), ([6.0, 0.5], [0, 3]), ([4.0], [0, 3]), ([8.0, 0, 0], [0, 1])):
        state = holding([3], 4, past)
        assert route(logits, state, EVICTION_POLICIES["lru"], 2, policy).ids[0, 0].tolist() == expected


@each_eviction
@given(st.data())
def test_route_follows_the_models_rules_of_scores_and_groups(eviction, data):
    groups = data.draw(st.integers(1, 3))
    size = data.draw(st.integers(2, 4))
    scores = GateScores(
        function=data.draw(st.sampled_from(["softmax", "sigmoid", "relu"])),
        groups=groups,
        top_groups=data.draw(st.integers(1, groups)),
        group_score=data.draw(st.sampled_from(["best", "best-two"])),
        renormalise=data.draw(st.booleans()),
        epsilon=data.draw(st.sampled_from([0.0, 1e-20, 0.5])),
        scale=data.draw(st.sampled_from([1.0, 2.5])),
    )
    n, k = groups * size, data.draw(st.integers(1, min(4, size * scores.top_groups)))
    assume(scores.function != "relu" or not scores.renormalise or scores.epsilon == 0.5)  # or 0 / 0
    top_j, capacity, seed = data.draw(st.integers(0, k)), data.draw(st.integers(k, n)), data.draw(SEEDS)
    rule, value = data.draw(rules(n))
    logits = normal_logits(seed, 1, 8, n)
    correction = (normal_logits(seed + 1, n) / 8).tolist() if data.draw(st.booleans()) else None
    written = logits[0].tolist()
    assume(away_from_boundary(written, rule, value, scores, correction))

    cache, state = LiteralCache(capacity, eviction), empty(capacity, n)
    expected = literal_route(written, cache, k, rule, value, top_j, scores, correction)
    policy = policy_for(rule, value, top_j)
    tensor = None if correction is None else torch.tensor(correction)
    routing = route(logits, state, EVICTION_POLICIES[eviction], k, policy, scores, tensor)
    assert_as_written(routing, expected)
    assert state.range_sum.item() == pytest.approx(sum(cache.ranges), rel=1e-5)


@pytest.mark.parametrize("version", [2, 3])
def test_route_without_a_cache_chooses_as_transformers_deepseek(version):
    transformers = pytest.importorskip("transformers")
    name = f"deepseek_v{version}"
    modeling = getattr(transformers.models, name)
    modeling = getattr(modeling, f"modeling_{name}")
    sizes = {"hidden_size": 32, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    if version == 2:
        config = transformers.DeepseekV2Config(**sizes, n_routed_experts=16, topk_method="group_limited_greedy")
        router = modeling.DeepseekV2TopkRouter(config)
        scores = GateScores(groups=4, top_groups=2, scale=2.5)
    else:
        router = modeling.DeepseekV3TopkRouter(transformers.DeepseekV3Config(**sizes, n_routed_experts=16))
        scores = GateScores("sigmoid", 4, 2, "best-two", renormalise=True, epsilon=1e-20, scale=2.5)
        router.e_score_correction_bias.copy_(normal_logits(3, 16) / 10)
    with torch.no_grad():
        router.weight.copy_(normal_logits(1, 16, 32))
        logits, weights, ids = router(normal_logits(2, 1, 40, 32))
    correction = router.e_score_correction_bias if version == 3 else None
    routing = route(logits[None], empty(8, 16), EVICTION_POLICIES["lru"], 4, scores=scores, correction=correction)
    order = routing.ids[0].argsort(-1)
    theirs = ids.argsort(-1)
    assert torch.equal(routing.ids[0].gather(-1, order), ids.gather(-1, theirs))
    torch.testing.assert_close(routing.weights[0].gather(-1, order), weights.gather(-1, theirs))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"function": "tanh"}, "unknown score function"),
        ({"group_score": "worst"}, "unknown group score"),
        ({"groups": 2, "top_groups": 3}, "3 of 2 groups"),
        ({"groups": 5}, "12 experts cannot be split into 5 groups"),
        ({"groups": 6, "top_groups": 1}, "3 experts cannot be chosen among 1 groups of 2"),
        ({"groups": 12, "top_groups": 3, "group_score": "best-two"}, "no two best"),
    ],
)
def test_scores_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        route(torch.zeros(1, 1, 12), empty(4, 12), EVICTION_POLICIES["lru"], 3, scores=GateScores(**wrong))


# --------------------------------------------------------------------------------------------------------- misses


@each_eviction
@given(st.data(), SEEDS)
def test_misses_fetched_in_order_serve_every_token(eviction, data, seed):
    n, k, top_j, capacity = data.draw(shapes())
    rule, value = data.draw(rules(n))
    state, policy = empty(capacity, n), policy_for(rule, value, top_j)
    for call in range(2):  # the second begins with what the first left
        pages = state.page_of[0].tolist()
        routing = route(normal_logits(seed + call, 1, 12, n), state, EVICTION_POLICIES[eviction], k, policy)
        misses = iter(zip(routing.misses.pages[0].tolist(), routing.misses.slots[0].tolist(), strict=True))
        for t, hits in enumerate(routing.hits[0].tolist()):
            for _ in range(hits.count(False)):
                e, slot = next(misses)
                pages[slot] = e
            assert [pages[slot] for slot in routing.slots[0, t].tolist()] == routing.ids[0, t].tolist()
        assert pages == state.page_of[0].tolist()


# ----------------------------------------------------------------------------------------------------- properties


@given(st.data())
def test_experts_are_distinct_and_the_best_j_are_kept(data):
    n, k, top_j, capacity = data.draw(shapes())
    logits = data.draw(coarse_logits(8, n))
    rule, value = data.draw(rules(n))
    routing = route(as_tensor(logits), empty(capacity, n), EVICTION_POLICIES["lru"], k, policy_for(rule, value, top_j))
    for z, ids in zip(logits, routing.ids[0].tolist(), strict=True):
        assert len(set(ids)) == k
        assert ids[:top_j] == by_logit(z)[:top_j]


def test_the_best_are_kept_where_j_is_above_k():
    routing = route(
        torch.tensor([[[1.0, 2.0, 0.0]]]), empty(2, 3), EVICTION_POLICIES["lru"], 1, policy_of(CachePrior(0.0, 2))
    )
    assert routing.ids[0].tolist() == [[1]]


@given(st.data(), SEEDS)
def test_no_bias_is_the_original_routing(data, seed):
    n, k, top_j, capacity = data.draw(shapes())
    logits = normal_logits(seed, 1, 8, n)
    lru, expected_state = EVICTION_POLICIES["lru"], empty(capacity, n)
    expected = route(logits, expected_state, lru, k)
    for nothing in (CachePrior(0.0, top_j), MaxRank(0, top_j), MaxRank(k, top_j), CumSum(0.0, top_j)):
        state = empty(capacity, n)
        assert_same_routing(route(logits, state, lru, k, policy_of(nothing)), expected)
        assert_same_state(state, expected_state)


@given(st.data(), SEEDS)
def test_becoming_resident_never_removes_an_expert_from_the_selection(data, seed):
    n, k, top_j, _ = data.draw(shapes())
    rule, value = data.draw(rules(n))
    resident = data.draw(st.sets(st.integers(0, n - 1)))
    e = data.draw(st.integers(0, n - 1))
    logits, policy, lru = normal_logits(seed, 1, 1, n), policy_for(rule, value, top_j), EVICTION_POLICIES["lru"]
    absent = route(logits, holding(resident - {e}, n, [3.0]), lru, k, policy).ids[0, 0].tolist()
    present = route(logits, holding(resident | {e}, n, [3.0]), lru, k, policy).ids[0, 0].tolist()
    assert e not in absent or e in present
    assert set(present) - {e} <= set(absent)


@given(st.data(), SEEDS, st.booleans())
def test_gate_weights_are_unbiased_and_descend(data, seed, renormalise):
    n, k, top_j, capacity = data.draw(shapes())
    rule, value = data.draw(rules(n))
    logits = normal_logits(seed, 1, 8, n)
    policy = policy_for(rule, value, top_j)
    routing = route(
        logits, empty(capacity, n), EVICTION_POLICIES["lru"], k, policy, GateScores(renormalise=renormalise)
    )
    rows = zip(logits[0].tolist(), routing.ids[0].tolist(), routing.weights[0].tolist(), strict=True)
    for z, ids, weights in rows:
        gates = [softmax(z)[e] for e in ids]
        scale = sum(gates) if renormalise else 1.0
        assert weights == pytest.approx([gate / scale for gate in gates], rel=1e-5)
        assert all(a >= b for a, b in pairwise(weights))


@given(st.integers(2, 10), st.data())
def test_ties_go_to_the_lower_id(n, data):
    k = data.draw(st.integers(1, n))
    policy = data.draw(
        st.sampled_from([ORIGINAL, policy_of(MaxRank(n, 0)), policy_of(CumSum(0.5, 0)), policy_of(CachePrior(0.5, 0))])
    )
    routing = route(torch.zeros(1, 2, n), empty(n, n), EVICTION_POLICIES["lru"], k, policy)
    assert routing.ids[0].tolist() == [list(range(k))] * 2


# ------------------------------------------------------------------------------------------------- stepped semantics


@each_eviction
@given(st.data(), SEEDS)
def test_a_sequence_cut_anywhere_gives_the_same_bits(eviction, data, seed):
    n, k, top_j, capacity = data.draw(shapes())
    tokens = data.draw(st.integers(1, 24))
    (rule, value), evict = data.draw(rules(n)), EVICTION_POLICIES[eviction]
    cuts = sorted(data.draw(st.sets(st.integers(1, tokens))) | {0, tokens})
    logits, policy = normal_logits(seed, 1, tokens, n), policy_for(rule, value, top_j)

    whole_state = empty(capacity, n)
    whole = route(logits, whole_state, evict, k, policy, RENORMALISED)
    for bounds in (cuts, range(tokens + 1)):
        state = empty(capacity, n)
        for start, end in pairwise(bounds):
            part = route(logits[:, start:end], state, evict, k, policy, RENORMALISED)
            for name in ("ids", "weights", "slots", "hits"):
                assert torch.equal(getattr(part, name), getattr(whole, name)[:, start:end]), name
        assert_same_state(state, whole_state)


@each_eviction
@given(st.data(), SEEDS)
def test_caches_side_by_side_equal_each_alone(eviction, data, seed):
    n, k, _, _ = data.draw(shapes())
    rule = data.draw(st.sampled_from(list(rules_by_name(n).values())))
    member = st.tuples(st.integers(k, n), rule, st.integers(0, k))
    members = data.draw(st.lists(member, min_size=1, max_size=5))
    evict = EVICTION_POLICIES[eviction]
    capacities = [capacity for capacity, *_ in members]
    strategies = [Strategy(rule, value and float(value), top_j) for _, (rule, value), top_j in members]
    logits = normal_logits(seed, len(members), 12, n)

    state = Residency.empty(torch.tensor(capacities), n)
    routing = route(logits, state, evict, k, policy_of(*strategies))
    for b, (capacity, strategy) in enumerate(zip(capacities, strategies, strict=True)):
        alone = empty(capacity, n)
        part = route(logits[b : b + 1], alone, evict, k, policy_of(strategy))
        for name in ("ids", "weights", "slots", "hits"):
            assert torch.equal(getattr(part, name)[0], getattr(routing, name)[b]), name
        for field in (each for each in fields(Residency) if each.name in STATE):
            if field.name != "page_of":
                assert torch.equal(getattr(alone, field.name)[0], getattr(state, field.name)[b]), field.name
        assert state.page_of[b].tolist() == alone.page_of[0].tolist() + [-1] * (max(capacities) - capacity)


@each_eviction
@given(st.data(), SEEDS)
def test_the_page_table_stays_sound(eviction, data, seed):
    n, k, top_j, capacity = data.draw(shapes())
    wider = data.draw(st.integers(capacity, n))  # a second cache, so that slots beyond the first one's capacity exist
    (rule, value), evict = data.draw(rules(n)), EVICTION_POLICIES[eviction]
    state = Residency.empty(torch.tensor([capacity, wider]), n)
    for t in range(12):
        logits = normal_logits(seed + t, 1, 1, n).expand(2, 1, n)
        routing = route(logits, state, evict, k, policy_for(rule, value, top_j))
        for b, limit in enumerate((capacity, wider)):
            slot_of, page_of = state.slot_of[b].tolist(), state.page_of[b].tolist()
            ids, slots = routing.ids[b, 0].tolist(), routing.slots[b, 0].tolist()
            assert len(set(slots)) == k
            assert max(slots) < limit
            assert [slot_of[e] for e in ids] == slots  # nothing that the token needs was the victim
            pairs = {(e, slot) for e, slot in enumerate(slot_of) if slot >= 0}
            assert pairs == {(e, slot) for slot, e in enumerate(page_of) if e >= 0}


# -------------------------------------------------------------------------------------------------------- the experts


def literal_expert(x, gate_up, down):
    """One token through one expert, in float64 lists."""
    inner = len(gate_up) // 2
    gate, up = (
        [sum(w * v for w, v in zip(row, x, strict=True)) for row in rows] for rows in (gate_up[:inner], gate_up[inner:])
    )
    h = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
    return [sum(w * v for w, v in zip(row, h, strict=True)) for row in down]


def random_expert(seed, hidden, inner, *leading):
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(*leading, 2 * inner, hidden, generator=generator) / hidden**0.5
    return gate_up, torch.randn(*leading, hidden, inner, generator=generator) / inner**0.5


def relative_rms(y, expected):
    return float((y.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


@pytest.mark.parametrize("tokens, n, k, hidden, inner", [(1, 1, 1, 1, 1), (3, 4, 2, 6, 5), (5, 3, 3, 8, 2)])
def test_experts_equal_a_loop_over_tokens(tokens, n, k, hidden, inner):
    gate_up, down = random_expert(3, hidden, inner, n)
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(4))
    ids = torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(t))[:k] for t in range(tokens)])
    weights = torch.rand(tokens, k, generator=torch.Generator().manual_seed(5))
    dense = {"gate_up": gate_up, "down": down}
    expected = [[0.0] * hidden for _ in range(tokens)]
    for t in range(tokens):
        for e, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            y = literal_expert(x[t].tolist(), gate_up[e].tolist(), down[e].tolist())
            expected[t] = [total + weight * value for total, value in zip(expected[t], y, strict=True)]
    torch.testing.assert_close(
        experts(x, ids, weights, dense, PageFormat("bf16", hidden, inner)), torch.tensor(expected), rtol=1e-4, atol=1e-5
    )


def test_experts_give_back_the_inputs_dtype():
    gate_up, down = random_expert(3, 6, 5, 2)
    dense = {"gate_up": gate_up, "down": down}
    ids = torch.tensor([[0], [1]])
    y = experts(torch.ones(2, 6).bfloat16(), ids, torch.ones(2, 1), dense, PageFormat("bf16", 6, 5))
    assert (y.dtype, y.shape) == (torch.bfloat16, (2, 6))


@pytest.mark.parametrize("hidden, inner", [(12, 7), (32, 16)])
@pytest.mark.parametrize("tokens", [1, 4])
def test_one_expert_from_a_bf16_page(tokens, hidden, inner):
    page_format = PageFormat("bf16", hidden, inner)
    gate_up, down = (weight.bfloat16() for weight in random_expert(6, hidden, inner))
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(7))
    y = on_one_page(x, page_format.pack(gate_up, down), page_format)
    expected = [literal_expert(row, gate_up.tolist(), down.tolist()) for row in x.tolist()]
    torch.testing.assert_close(y, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden, inner, group", [(32, 32, 32), (64, 128, 32), (128, 64, 64), (96, 32, 32)])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)], ids=str)
@pytest.mark.parametrize("kind, bits", [("int4", 4), ("int2", 2)])
def test_one_expert_from_a_page_of_groups(kind, bits, tokens, hidden, inner, group, dtype, tolerance):
    page_format = PageFormat(kind, hidden, inner, group)
    gate_up, down = random_expert(8, hidden, inner)
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(9)).to(dtype)
    y = on_one_page(x, page_format.pack(gate_up, down), page_format)
    stored = [dequantize_groups(*quantize_groups(weight, group, bits), bits).tolist() for weight in (gate_up, down)]
    expected = torch.tensor([literal_expert(row, *stored) for row in x.tolist()], dtype=torch.float64)
    assert relative_rms(y, expected) < tolerance  # bfloat16 has 8 bits; a wrong row order or scale gives about 1


def on_one_page(x, page, page_format):
    return side_by_side(x, page_format.views(page[None]), torch.tensor([0]), page_format)[0]
