"""What the tests of policies share: random logits, a calibration of them, and the models' rules in plain Python."""

import math

import torch

from cachemoe.kernels.state import GateScores, Residency
from cachemoe.moe.calibrate import ratios, threshold
from cachemoe.moe.calibration import Calibration
from cachemoe.moe.chooser import Chooser
from cachemoe.moe.routers import RoutingRule, own_choice
from cachemoe.moe.strategies import Strategy
from cachemoe.offload.residency import least_recently_used
from cachemoe.offload.simulate import lru_misses

NEAR = 1e-6  # where float32 may fall on the other side of a bound than float64


def logits_of(seed, *shape):
    return 1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rules(experts):
    """By name, models' rules for E experts."""
    correction = logits_of(99, experts) / 10
    corrected = GateScores("sigmoid", renormalise=True, epsilon=1e-20, scale=2.5)
    return {
        "softmax": RoutingRule(GateScores()),
        "renormalised": RoutingRule(GateScores(renormalise=True)),
        "sigmoid with a correction": RoutingRule(corrected, correction),
    }


RULES = tuple(rules(1))


def calibration_of(rule, logits, k, sensitivities=None, **other):
    """Of one layer's logits ``[T, E]``."""
    experts = logits.shape[1]
    ids, weights = own_choice(rule, logits, k)
    parts = {
        "ratios": ratios(weights)[None],
        "thresholds": threshold(rule, logits, k)[None],
        "sensitivities": torch.ones(1) if sensitivities is None else torch.tensor(sensitivities),
        "removal": torch.arange(experts, dtype=torch.int16)[None],
        "misses": lru_misses(ids, experts)[None] / len(ids),
        "token_ids": torch.tensor([0], dtype=torch.int32),
        "by_token": logits.mean(0).expand(1, 2, -1).half(),
        "clusters": torch.arange(experts, dtype=torch.int16).expand(3, 1, -1) % 2,
        "importance": torch.arange(experts, dtype=torch.float32)[None],
        "cheap_losses": torch.linspace(0, 1, 9),
        "hobbit": torch.tensor([1, 1, 1, 1], dtype=torch.int16),
        "cheaper": "int4",
        "model": "abc",
        "name": "random",
        "k": k,
        "tokens": len(logits),
    }
    return Calibration(**parts | other)


def empty(capacity, experts):
    return Residency.empty(torch.tensor([capacity]), experts)


def routed(text, rule, logits, k, calibration=None, state=None, top_j=2, **options):
    """One layer's logits ``[T, E]`` routed by a strategy from a cold cache that holds all, or the one given."""
    experts = logits.shape[1]
    strategy = Strategy.parse(text, experts, k, top_j)
    chooser = Chooser([rule], k, [strategy], least_recently_used, calibration=calibration, **options)
    return chooser.route(0, logits[None], empty(experts, experts) if state is None else state)


def scores_of(z, rule):
    if rule.scores.function == "sigmoid":
        return [1 / (1 + math.exp(-x)) for x in z]
    powers = [math.exp(x - max(z)) for x in z]
    return [power / sum(powers) for power in powers]


def values_of(z, rule):
    """What the model ranks its experts by."""
    if rule.correction is None:
        return list(z)
    return [a + b for a, b in zip(scores_of(z, rule), rule.correction.tolist(), strict=True)]


def best_first(z, rule):
    values = values_of(z, rule)
    return sorted(range(len(z)), key=lambda e: (-values[e], e))


def weights_of(z, run, rule):
    """The model's weights of the experts that run."""
    scores = scores_of(z, rule)
    weights = [scores[e] for e in run]
    total = sum(weights) + rule.scores.epsilon if rule.scores.renormalise else 1.0
    return [rule.scores.scale * weight / total for weight in weights]


def shares_of(z, chosen, rule):
    """Of the chosen experts' scores."""
    scores = scores_of(z, rule)
    return [scores[e] / sum(scores[c] for c in chosen) for e in chosen]


def ran(routing, t):
    """The experts that run for a token, in order."""
    return [e for e, slot in zip(routing.ids[0, t].tolist(), routing.slots[0, t].tolist(), strict=True) if slot >= 0]


def assert_weighs(routing, t, z, rule):
    """The weights are the model's own of those that run, and 0 of the others."""
    kept = routing.slots[0, t] >= 0
    expected = torch.tensor(weights_of(z, ran(routing, t), rule))
    torch.testing.assert_close(routing.weights[0, t][kept], expected, rtol=1e-5, atol=1e-7)
    assert not routing.weights[0, t][~kept].any()


def assert_same(a, b):
    """Every bit of two routings."""
    for mine, other in zip(a.tensors(), b.tensors(), strict=True):
        assert torch.equal(mine, other)
