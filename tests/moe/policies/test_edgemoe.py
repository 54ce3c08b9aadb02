"""EdgeMoE against its rules in plain Python: each expert's own precision, and who leaves one cache of all layers."""

import pytest
import torch
from literal import RULES, best_first, calibration_of, logits_of, routed, rules

from cachemoe.kernels.eviction import eviction
from cachemoe.kernels.route_cpu import place
from cachemoe.kernels.state import Residency
from cachemoe.moe.cheapening import importance
from cachemoe.moe.policies import edgemoe
from cachemoe.offload.residency import least_frequently_used, least_recently_used

EXPERTS, K = 12, 3


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("tolerated", [0.0, 0.3, 1.0])
def test_each_expert_runs_at_its_own_level(name, tolerated):
    rule, logits = rules(EXPERTS)[name], logits_of(1, 200, EXPERTS)
    known = calibration_of(rule, logits, K)
    cheap = set(known.bits(tolerated)[0].nonzero().flatten().tolist())
    state = Residency.empty(torch.tensor([EXPERTS]), EXPERTS, (EXPERTS,))
    routing = routed(f"edgemoe:{tolerated}", rule, logits, K, known, state)
    assert routing.ids[0].tolist() == [best_first(z, rule)[:K] for z in logits.tolist()]
    levels = state.levels_of(routing.slots[0])
    assert levels.tolist() == [[int(e in cheap) for e in token] for token in routing.ids[0].tolist()]
    assert (tolerated == 0) == (not cheap)


def test_uses_over_the_layers_to_go_say_who_leaves():
    """The prose of the paper: d = (i - I) mod S, S for 0; the expert of the next layer has 1."""
    layers, generator = 4, torch.Generator().manual_seed(0)
    state = Residency.empty(torch.tensor([9]), 5, (), layers)
    state.uses.copy_(torch.randint(0, 30, (1, 20), generator=generator))
    state.last_use.copy_(torch.randint(0, 900, (1, 20), generator=generator))
    for layer in range(layers):
        keys = eviction(edgemoe.soon_and_often, state.of_layer(layer))()[0].tolist()

        def literal(e, layer=layer):
            to_go = (e // 5 - layer) % layers or layers
            return ((int(state.uses[0, e]) << 20) // to_go, int(state.last_use[0, e]))

        assert sorted(range(20), key=keys.__getitem__) == sorted(range(20), key=literal)
    next_layer = eviction(edgemoe.soon_and_often, state.of_layer(1))()[0]
    assert next_layer[10] == (int(state.uses[0, 10]) << 40) + int(state.last_use[0, 10])  # layer 2's are the nearest


def test_importance_is_what_rounding_adds_to_the_output():
    generator = torch.Generator().manual_seed(0)
    full, cheap = torch.randn(2, 4, 30, 6, generator=generator)
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(30)])
    weights = torch.rand(30, 2, generator=generator)
    made, total, added = importance(full, cheap, ids, weights), 0.0, [0.0] * 4
    for t in range(30):
        output = sum(weights[t, k] * full[ids[t, k], t] for k in range(2))
        total += float(output.square().sum())
        for k in range(2):
            e = int(ids[t, k])
            added[e] += float((weights[t, k] * (full[e, t] - cheap[e, t])).square().sum())
    torch.testing.assert_close(made, torch.tensor([each / total for each in added]))
    assert not importance(full, full, ids, weights).any()


# ------------------------------------------------------------------------------------ one cache of 32 layers, an eighth


def as_printed(uses, distance):
    """The paper's formula to the letter: of the next layer's experts the denominator is S - 1, of this layer's 0."""
    layers = 32
    return (uses << 20) // (1 + (layers - distance) * layers) + (distance == layers) * (1 << 50)


def hits_of(evict, layers=32, experts=8, k=2, slots=32, tokens=120):
    """The share of hits of skewed choices, as frequent in each layer as Zipf says."""
    generator = torch.Generator().manual_seed(0)
    popularity = (1 / torch.arange(1, experts + 1)).repeat(layers, 1)
    popularity = popularity.gather(1, torch.rand(layers, experts, generator=generator).argsort(1))
    state, hits = Residency.empty(torch.tensor([slots]), experts, (), layers), 0
    for _ in range(tokens):
        for layer in range(layers):
            ids = popularity[layer].multinomial(k, generator=generator)
            routing = place(ids[None, None], torch.ones(1, 1, k), state.of_layer(layer), evict)
            hits += int(routing.hits.sum())
    return hits / (tokens * layers * k)


def test_the_proses_direction_is_the_one_that_works():
    """And an LRU of all layers together finds nothing: what is needed next was used longest ago."""
    prose, printed = hits_of(edgemoe.soon_and_often), hits_of(as_printed)
    lfu, lru = hits_of(least_frequently_used), hits_of(least_recently_used)
    assert lru < 0.02
    assert printed < 0.6 * prose
    assert prose > lfu
