"""The stepped batched quality pass against plain token-by-token decode."""

import pytest
import torch

from cachemoe.kernels.reference_route import route
from cachemoe.kernels.state import GateScores, Residency
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.models import load_model
from cachemoe.moe.quality import Setting, evaluate
from cachemoe.moe.strategies import Strategy, policy_of
from cachemoe.moe.swap import Swap
from cachemoe.offload.residency import least_recently_used

CONTEXT, TOP_J = 24, 1
TEXT = b"Quality is measured stepped, with the caches evolving from window to window, as in decode."
WINDOWS = torch.tensor(list(TEXT[: 3 * CONTEXT])).view(3, CONTEXT)


@pytest.fixture(scope="module")
def shape(tiny_checkpoint):
    return Checkpoint(tiny_checkpoint).shape


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    model = load_model(tiny_checkpoint, torch.float64)
    model.set_experts_implementation("eager")  # torch's grouped matmul has no float64
    return model


@pytest.fixture(scope="module")
def evaluation(model, shape):
    names = ("original", "pruning:1", "max-rank:4", "cumsum:0.6", "cache-prior:0", "cache-prior:0.4")
    strategies = [Strategy.parse(name, shape.experts, shape.top_k, TOP_J) for name in names]
    settings = [Setting(strategy, capacity) for capacity in (2, 5) for strategy in strategies]
    return settings, evaluate(model, shape, WINDOWS, settings, least_recently_used)


@torch.inference_mode()
def decode(model, shape, setting):
    """Negative log-likelihood, misses and residency, one token at a time through the key-value cache."""
    state = Residency.empty(torch.full((len(shape.layers),), setting.capacity), shape.experts)
    policy, k = policy_of(setting.strategy), setting.strategy.places(shape.experts, shape.top_k)
    scores = GateScores()
    nats, misses = 0.0, 0

    def route_layer(layer, logits, hidden):
        nonlocal misses
        routing = route(logits[None], state[layer : layer + 1], least_recently_used, k, policy, scores)
        misses += int(routing.misses.count)
        return routing

    with Swap(model, route_layer):
        for window in WINDOWS:
            past = None
            for token, target in zip(window, [*window[1:], None], strict=True):
                output = model(token[None, None], past_key_values=past, use_cache=True)
                past = output.past_key_values
                if target is not None:
                    nats -= float(output.logits[0, 0].log_softmax(-1)[target])
    return nats, misses, state


def test_stepped_quality_is_that_of_decode(model, shape, evaluation):
    for setting, quality in zip(evaluation[0], evaluation[1].settings, strict=True):
        nats, misses, state = decode(model, shape, setting)
        assert quality.misses == misses, setting
        assert sum(quality.nats) == pytest.approx(nats, rel=1e-4), setting
        assert torch.equal(quality.state.resident(), state.resident()), setting


def test_exact_strategies_cost_no_quality(evaluation):
    settings, measured = evaluation
    for setting, quality in zip(settings, measured.settings, strict=True):
        if setting.strategy.label == "exact":
            assert quality.nats == pytest.approx(measured.unmodified.nats, rel=1e-9)
            assert quality.agreements == quality.tokens
            assert quality.kl == pytest.approx(0, abs=1e-6)

    assert max(quality.kl for quality in measured.settings) > 0


def test_selections_are_counted(shape, evaluation):
    for setting, quality in zip(evaluation[0], evaluation[1].settings, strict=True):
        assert quality.changes.selections == len(shape.layers) * WINDOWS.numel() * shape.top_k, setting
        assert quality.tokens == 3 * (CONTEXT - 1)


def test_original_ids_are_the_unmodified_models(model, evaluation):
    with torch.inference_mode():
        logits = model(WINDOWS[:1], output_router_logits=True).router_logits
    expected = torch.stack([z.topk(2, dim=-1).indices for z in logits])
    assert torch.equal(evaluation[1].original_ids[:, :CONTEXT], expected)
