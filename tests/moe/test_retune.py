"""Another value of the same strategy: routers are not asked again, and it routes as a model loaded so."""

import pytest
import torch

from cachemoe.moe import layers, pooled, swap
from cachemoe.moe.layers import moe_layers
from cachemoe.moe.strategies import CachePrior, CumSum, MaxRank, Strategy
from cachemoe.offload.engine import OffloadEngine
from cachemoe.offload.errors import InputError

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
    """What it answers, token by token after a prompt, and how many experts ran."""
    model.cachemoe.reset_counters()
    output, logits = model(TOKENS, use_cache=True), []
    for token in (7, 100, 7, 33, 250):
        output = model(torch.tensor([[token]]), past_key_values=output.past_key_values)
        logits.append(output.logits)
    return torch.cat(logits), model.cachemoe.counters.selections


SAME_STRATEGY = [
    (CachePrior(0.1, 0), CachePrior(1.0, 0)),
    (CachePrior(0.7, 1), CachePrior(0.7, 0)),
    (CachePrior(1.0, 0, 0.5), CachePrior(1.0, 0, 0.001)),
    (MaxRank(2, 0), MaxRank(7, 0)),
    (CumSum(0.2, 0), CumSum(0.99, 0)),
    (Strategy("latency-ratio", 0.1, 0), Strategy("latency-ratio", 3.0, 0)),
    (Strategy("random-swap", 0.1, 0), Strategy("random-swap", 0.9, 0)),
    ("random-drop:0.1", "random-drop:0.9"),
    ("naee-skip:0.1", "naee-skip:0.9"),
    ("adap-skip:0.0001", "adap-skip:1e6"),
]


@pytest.mark.parametrize(("before", "after"), SAME_STRATEGY)
def test_another_value_asks_no_router_and_routes_as_if_loaded_so(
    opened, tiny_calibration, asked, before, after, monkeypatch
):
    monkeypatch.setattr(OffloadEngine, "miss_cost", lambda engine: 1.5)  # measured, and never twice the same
    model, fresh, other = (
        opened(routing=routing, calibration=tiny_calibration, pool=3) for routing in (before, after, before)
    )
    asked.clear()
    monkeypatch.setattr(pooled, "Chooser", None)  # a captured graph goes on with the one that there is
    model.cachemoe.routing = after
    assert asked == []
    assert model.cachemoe.routing == fresh.cachemoe.routing
    logits, selections = said(model)
    expected, expected_selections = said(fresh)
    assert torch.equal(logits, expected) and selections == expected_selections
    assert not torch.equal(logits, said(other)[0])


@pytest.mark.parametrize(("before", "after"), [(CachePrior(1.0, 0), CachePrior(1.0, 0, 0.001)), (None, "max-rank:5")])
def test_a_bound_where_there_was_none_asks_no_router_that_is_known(opened, asked, before, after):
    model, fresh, other = opened(routing=before), opened(routing=after), opened(routing=before)
    model.cachemoe.routing = CachePrior(0.5, 0)
    model.cachemoe.routing = before
    asked.clear()
    model.cachemoe.routing = after
    assert asked == []
    logits, expected, first = (said(each)[0] for each in (model, fresh, other))
    assert torch.equal(logits, expected)
    assert before is None or not torch.equal(logits, first)


@pytest.mark.parametrize("after", ["naee-prune:3", "relu-route", "pruning:1", "original"])
def test_another_strategy_routes_as_if_loaded_so(opened, tiny_calibration, after):
    model = opened(routing="cache-prior:0.3", calibration=tiny_calibration)
    fresh = opened(routing=after, calibration=tiny_calibration)
    model.cachemoe.routing = after
    logits, selections = said(model)
    expected, expected_selections = said(fresh)
    assert torch.equal(logits, expected) and selections == expected_selections


def test_fewer_experts_left_are_fewer(opened, tiny_calibration):
    """What is added to logits is no knob."""
    model = opened(routing="naee-prune:7", calibration=tiny_calibration)
    fresh = opened(routing="naee-prune:2", calibration=tiny_calibration)
    model.cachemoe.routing = "naee-prune:2"
    assert torch.equal(said(model)[0], said(fresh)[0])


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
    asked.clear()
    model.cachemoe.routing = None
    model.cachemoe.routing = CachePrior(0.2, 0)
    assert asked == []
    assert torch.equal(said(model)[0], said(opened(routing=CachePrior(0.2, 0)))[0])


def test_a_value_that_is_refused_changes_nothing(opened, tiny_calibration):
    model = opened(routing="naee-skip:0.5", calibration=tiny_calibration)
    first = said(model)
    for wrong in ("naee-skip:2", "naee-skip:", "naee-skip:nan"):
        with pytest.raises(InputError):
            model.cachemoe.routing = wrong
    assert str(model.cachemoe.routing) == "naee-skip:0.5"
    assert torch.equal(said(model)[0], first[0])
