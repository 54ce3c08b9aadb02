"""Eviction by what a forecast expects, against the rule in plain Python."""

import pytest
import torch
from literal import logits_of

from cachemoe.kernels.eviction import eviction
from cachemoe.kernels.state import Residency
from cachemoe.moe.policies.readme_lookahead import farthest_next_use
from cachemoe.moe.sources import Forecast
from cachemoe.offload.residency import least_recently_used

LAYERS, EXPERTS = 4, 5


def choose(layer, logits):
    return logits.topk(2).indices.tolist()


def gates(tables):
    return [lambda tokens, table=table: table.expand(len(tokens), -1) for table in tables]


@pytest.mark.parametrize("window", [0, 1, 2, 9])
def test_the_next_layers_experts_are_expected(window):
    tables, state = logits_of(1, LAYERS, EXPERTS), Residency.empty(torch.tensor([9]), EXPERTS, (), LAYERS)
    forecast = Forecast(gates(tables), choose, window)
    for layer in range(LAYERS):
        forecast.note(layer, torch.zeros(1, 3), state)
        expected = {i * EXPERTS + e for i in range(layer + 1, min(layer + window, LAYERS - 1) + 1)
                    for e in tables[i].topk(2).indices.tolist()}  # fmt: skip
        assert set(state.expected[0].nonzero().flatten().tolist()) == expected


def test_of_many_tokens_nothing_is_expected():
    state = Residency.empty(torch.tensor([9]), EXPERTS, (), LAYERS)
    forecast = Forecast(gates(logits_of(1, LAYERS, EXPERTS)), choose, 3)
    for tokens in (1, 4, 1):  # of a token that begins in the middle, as after an interrupt, nothing is known either
        forecast.note(0 if tokens == 1 else 1, torch.zeros(tokens, 3), state)
        assert bool(state.expected.any()) == (tokens == 1)
    forecast.note(1, torch.zeros(4, 3), state)
    forecast.note(2, torch.zeros(1, 3), state)
    assert not state.expected.any()


def test_without_a_forecast_it_is_lru_and_with_one_the_unexpected_leave_first():
    state, generator = Residency.empty(torch.tensor([9]), EXPERTS, (), LAYERS), torch.Generator().manual_seed(0)
    state.last_use.copy_(torch.randperm(LAYERS * EXPERTS, generator=generator)[None] + 1)
    lru = eviction(least_recently_used, state.of_layer(1))()[0]
    assert (eviction(farthest_next_use, state.of_layer(1))()[0].argsort() == lru.argsort()).all()
    state.expected[0, [2 * EXPERTS, 3 * EXPERTS + 1, 0]] = 1
    keys = eviction(farthest_next_use, state.of_layer(1))()[0]
    order = keys.argsort().tolist()
    # Layer 0 comes after layers 2 and 3: what is needed last leaves first of the expected.
    assert order[-3:] == [0, 3 * EXPERTS + 1, 2 * EXPERTS]
    unexpected = [e for e in lru.argsort().tolist() if e not in (2 * EXPERTS, 3 * EXPERTS + 1, 0)]
    assert order[:-3] == unexpected


@pytest.mark.parametrize("window", [0, 1])
def test_the_output_is_the_models_bit_for_bit(opened, tiny_calibration, window):
    tokens = torch.randint(0, 256, (1, 30), generator=torch.Generator().manual_seed(2))
    rows = []
    for routing in ("original", f"readme-lookahead:{window}"):
        model, past, logits = opened(pool=3, routing=routing, calibration=tiny_calibration), None, []
        with torch.inference_mode():
            for token in tokens[0]:
                output = model(token[None, None], past_key_values=past, use_cache=True)
                past = output.past_key_values
                logits.append(output.logits)
        rows.append(torch.cat(logits))
        assert model.cachemoe.label == "exact" and model.cachemoe.counters.misses > 10
    assert torch.equal(*rows)
