"""EdgeMoE against its rules in plain Python: each expert's own precision, and who leaves one cache of all layers."""

import pytest
import torch
from literal import RULES, best_first, calibration_of, logits_of, routed, rules

from cachemoe.kernels.eviction import eviction
from cachemoe.kernels.state import Residency
from cachemoe.moe.cheapening import importance
from cachemoe.moe.policies import edgemoe

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
