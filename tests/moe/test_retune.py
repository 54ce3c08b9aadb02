"""Another value of the same strategy: routers are not asked again, and it routes as a model loaded so."""

import pytest
import torch

from cachemoe.moe import layers, pooled, swap
from cachemoe.moe.layers import moe_layers
from cachemoe.moe.strategies import CachePrior

TOKENS = torch.tensor([[5, 80, 17, 200, 33, 9, 41, 120]])


@pytest.fixture
def asked(monkeypatch):
    """Every time that a router is asked for its rule, or probed."""
    calls = []
    for module, name in ((layers, "probe"), (swap, "probe"), (pooled, "routing_rules")):
        own = getattr(module, name)

        def counted(*arguments, own=own, name=name, **options):
            calls.append(name)
            return own(*arguments, **options)

        monkeypatch.setattr(module, name, counted)
    return calls


@torch.inference_mode()
def said(model):
    """What it answers, a prompt and then token by token, and what it has missed; from a cold pool."""
    pool = [layer.slots for layer in model.cachemoe.layers]
    model.cachemoe.resize(8)
    model.cachemoe.resize(pool[0])
    model.cachemoe.reset_counters()
    output, logits = model(TOKENS, use_cache=True), []
    for token in (7, 100, 7, 33, 250):
        output = model(torch.tensor([[token]]), past_key_values=output.past_key_values)
        logits.append(output.logits)
    return torch.cat(logits), model.cachemoe.counters.selections


SAME_STRATEGY = [
    ("cache-prior:0.1", "cache-prior:1"),
    ("cache-prior:0.7,max-regret=0.2", "cache-prior:0.7,max-regret=0.001"),
    ("max-rank:2", "max-rank:7"),
    ("cumsum:0.2", "cumsum:0.9"),
    ("random-drop:0.1", "random-drop:0.9"),
    ("random-swap:0.1", "random-swap:0.9"),
    ("naee-skip:0.1", "naee-skip:0.9"),
    ("adap-skip:0.0001", "adap-skip:100"),
    ("latency-ratio:0.1", "latency-ratio:3"),
]


@pytest.mark.parametrize(("before", "after"), SAME_STRATEGY)
def test_another_value_asks_no_router_and_routes_as_if_loaded_so(opened, tiny_calibration, asked, before, after, monkeypatch):
    from cachemoe.offload.engine import OffloadEngine

    monkeypatch.setattr(OffloadEngine, "miss_cost", lambda engine: 1.5)  # measured, and never twice the same
    model, fresh = (opened(routing=routing, calibration=tiny_calibration) for routing in (before, after))
    first = said(model)
    asked.clear()
    model.cachemoe.routing = after
    assert asked == []
    assert str(model.cachemoe.routing) == after == str(fresh.cachemoe.routing)
    logits, selections = said(model)
    expected, expected_selections = said(fresh)
    assert torch.equal(logits, expected) and selections == expected_selections
    if before.partition(":")[0] not in ("max-rank", "cumsum", "cache-prior", "random-swap", "latency-ratio"):
        assert not torch.equal(logits, first[0])  # those swap nothing, K being J


@pytest.mark.parametrize(
    ("before", "after"), [(CachePrior(0.2, 2), CachePrior(0.9, 0)), (CachePrior(1.0, 0), CachePrior(1.0, 1, 0.3))]
)
def test_another_j_or_bound_counts(opened, asked, before, after):
    model, fresh = opened(routing=before), opened(routing=after)
    first = said(model)
    asked.clear()
    model.cachemoe.routing = after
    assert asked == []
    logits, expected = said(model), said(fresh)
    assert torch.equal(logits[0], expected[0]) and not torch.equal(logits[0], first[0])


@pytest.mark.parametrize("after", ["naee-prune:3", "relu-route", "pruning:1", "original"])
def test_another_strategy_routes_as_if_loaded_so(opened, tiny_calibration, after):
    model = opened(routing="cache-prior:0.3", calibration=tiny_calibration)
    fresh = opened(routing=after, calibration=tiny_calibration)
    model.cachemoe.routing = after
    expected = said(fresh)
    logits, selections = said(model)
    assert torch.equal(logits, expected[0]) and selections == expected[1]
    model.cachemoe.routing = "cache-prior:0.3"
    model.cachemoe.routing = after
    assert torch.equal(said(model)[0], expected[0])


def test_fewer_experts_left_are_fewer(opened, tiny_calibration):
    """What is added to logits is not only a knob."""
    model = opened(routing="naee-prune:7", calibration=tiny_calibration)
    fresh = opened(routing="naee-prune:2", calibration=tiny_calibration)
    model.cachemoe.routing = "naee-prune:2"
    assert torch.equal(said(model)[0], said(fresh)[0])
    assert said(model)[1] == 2 * 5 * 2 + said(fresh)[1] - 2 * 5 * 2


def test_a_router_that_has_changed_is_asked_again(opened, asked):
    model = opened(routing=CachePrior(0.2, 0))
    asked.clear()
    model.cachemoe.routing = CachePrior(0.3, 0)
    assert asked == []
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.norm_topk_prob = not layer.router.norm_topk_prob
    model.cachemoe.routing = CachePrior(0.4, 0)
    assert "routing_rules" in asked and asked.count("probe") >= 2
    asked.clear()
    model.cachemoe.routing = CachePrior(0.5, 0)
    assert asked == []
    with torch.no_grad():
        moe_layers(model)[1].router.weight.mul_(1.5)
    model.cachemoe.routing = CachePrior(0.6, 0)
    assert "routing_rules" in asked


def test_exact_and_back_asks_no_router(opened, asked):
    model = opened(routing=CachePrior(0.2, 0))
    first = said(model)
    asked.clear()
    model.cachemoe.routing = None
    model.cachemoe.routing = CachePrior(0.2, 0)
    assert asked == []
    assert torch.equal(said(model)[0], first[0])


def test_a_value_that_is_refused_changes_nothing(opened, tiny_calibration):
    model = opened(routing="naee-skip:0.5", calibration=tiny_calibration)
    first = said(model)
    for wrong in ("naee-skip:2", "naee-skip:", "naee-skip:nan"):
        with pytest.raises(ValueError):
            model.cachemoe.routing = wrong
    assert str(model.cachemoe.routing) == "naee-skip:0.5"
    assert torch.equal(said(model)[0], first[0])
