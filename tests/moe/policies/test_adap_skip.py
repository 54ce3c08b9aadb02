"""adap-skip against its rule in plain Python, and what load gates."""

import math
from dataclasses import replace

import pytest
import torch
from literal import (
    NEAR,
    RULES,
    assert_same,
    assert_weighs,
    best_first,
    calibration_of,
    logits_of,
    ran,
    routed,
    rules,
    shares_of,
)

from cachemoe.moe.calibrate import divergences, rest_shares
from cachemoe.moe.calibration import Calibration
from cachemoe.moe.checkpoint import TINYMOE, Checkpoint
from cachemoe.moe.layers import moe_layers, recorded_routers, routing_rules
from cachemoe.moe.models import load_model
from cachemoe.moe.routers import own_choice

EXPERTS, TOKENS = 12, 120
each_rule = pytest.mark.parametrize("name", RULES)


@each_rule
@pytest.mark.parametrize("k", [1, 2, 4])
def test_t_of_0_is_the_model_bit_for_bit(name, k):
    rule, logits = rules(EXPERTS)[name], logits_of(1, TOKENS, EXPERTS)
    known = calibration_of(rule, logits, k, [0.0])
    assert_same(routed("adap-skip:0", rule, logits, k, known), routed("original", rule, logits, k))


@each_rule
@pytest.mark.parametrize(("t", "s"), [(0.005, 0.05), (0.005, 0.0229), (0.1, 0.9), (0.5, 1.0), (1.0, 0.5)])
def test_of_two_experts_only_the_best_runs_if_the_seconds_share_is_below_the_bound(name, t, s):
    rule, logits, bound = rules(EXPERTS)[name], logits_of(1, TOKENS, EXPERTS), math.sqrt(t / s)
    routing = routed(f"adap-skip:{t}", rule, logits, 2, calibration_of(rule, logits, 2, [s]))
    for token, z in enumerate(logits.tolist()):
        best, second = chosen = best_first(z, rule)[:2]
        share = shares_of(z, chosen, rule)[1]
        expected = [best] if share < bound else [best, second]
        assert ran(routing, token) == expected or abs(share - bound) < NEAR
        assert_weighs(routing, token, z, rule)
    assert t < s or (routing.slots[0, :, 1] < 0).all()


@each_rule
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("bound", [0.05, 0.2, 0.45, 0.7, 1.5])
def test_of_more_the_longest_tail_goes_that_has_less_than_the_bound_together(name, k, bound):
    rule, logits = rules(EXPERTS)[name], logits_of(1, TOKENS, EXPERTS)
    routing = routed(f"adap-skip:{bound * bound}", rule, logits, k, calibration_of(rule, logits, k, [1.0]))
    for token, z in enumerate(logits.tolist()):
        chosen = best_first(z, rule)[:k]
        shares = shares_of(z, chosen, rule)
        kept = min(n for n in range(1, k + 1) if n == k or sum(shares[n:]) < bound)
        near = any(abs(sum(shares[n:]) - bound) < NEAR for n in range(k))
        assert ran(routing, token) == chosen[:kept] or near
        assert_weighs(routing, token, z, rule)


def test_a_layer_of_little_sensitivity_drops_more():
    rule, logits = rules(EXPERTS)["renormalised"], logits_of(1, TOKENS, EXPERTS)
    dropped = [
        int((routed("adap-skip:0.005", rule, logits, 2, calibration_of(rule, logits, 2, [s])).slots < 0).sum())
        for s in (46.69, 1.0, 0.2, 0.0229, 0.0)
    ]
    assert dropped == sorted(dropped) and 0 < dropped[2] < dropped[4] == TOKENS


def test_calls_of_many_tokens_can_be_left_alone():
    rule, logits = rules(EXPERTS)["softmax"], logits_of(1, TOKENS, EXPERTS)
    known = calibration_of(rule, logits, 2)
    prompt = routed("adap-skip:0.1", rule, logits, 2, known, gates_prompts=False)
    assert_same(prompt, routed("original", rule, logits, 2))
    gated = routed("adap-skip:0.1", rule, logits, 2, known)
    assert (gated.slots < 0).any()
    for t in range(20):
        one = routed("adap-skip:0.1", rule, logits[t : t + 1], 2, known, gates_prompts=False)
        assert ran(one, 0) == ran(gated, t)


@torch.inference_mode()
def test_load_gates_decode_and_leaves_prompts_alone(opened, tiny_calibration):
    """With a bound above all shares each decoded token runs its best expert alone, in every layer."""
    prompt, token = torch.tensor([[5, 80, 17, 200, 33, 9]]), torch.tensor([[7]])
    plain, gated, pruned = (
        opened(routing=routing, calibration=tiny_calibration) for routing in ("original", "adap-skip:1e6", "pruning:1")
    )
    said = [model(prompt, use_cache=True) for model in (plain, gated, plain)]
    assert torch.equal(said[0].logits, said[1].logits)
    for model in (plain, gated):
        model.cachemoe.reset_counters()
    then = [
        model(token, past_key_values=before.past_key_values).logits
        for model, before in zip((plain, gated, pruned), said, strict=True)
    ]
    torch.testing.assert_close(then[1], then[2])
    assert not torch.allclose(then[1], then[0], rtol=1e-2, atol=1e-2)
    assert plain.cachemoe.counters.selections == 2 * 2 and gated.cachemoe.counters.selections == 2


@torch.inference_mode()
def test_each_layer_has_its_own_sensitivity(opened, tiny_calibration, tmp_path):
    known = replace(Calibration.load(tiny_calibration), sensitivities=torch.tensor([1e6, 1e-6]))
    known.save(tmp_path / "calibration")
    model = opened(routing="adap-skip:0.001", calibration=tmp_path / "calibration")
    model(torch.tensor([[7]]))
    assert [layer.selections for layer in model.cachemoe.layers] == [2, 1]


@torch.inference_mode()
def test_sensitivities_of_a_trained_model():
    model, shape = load_model(TINYMOE, torch.float32), Checkpoint(TINYMOE).shape
    windows = torch.tensor(list(b"The assignment statement binds names to values."[:40]))[None]
    rules_of_layers, calls = routing_rules(moe_layers(model), shape.top_k, "cpu"), []
    losses = divergences(model, shape, rules_of_layers, windows, lambda: calls.append(1))
    with recorded_routers(model) as answers:
        reference = model(windows).logits[0].log_softmax(-1)
    shares = []
    for rule, (answer,) in zip(rules_of_layers, answers, strict=True):
        weights = own_choice(rule, answer.logits, shape.top_k)[1]
        literal = torch.tensor([sum(row[1:]) / sum(row) for row in weights.tolist()])
        torch.testing.assert_close(rest_shares(weights), literal)
        shares.append(literal.square().mean())
    sensitivities = losses / torch.stack(shares)
    assert sensitivities.isfinite().all() and (sensitivities > 0).all()
    assert len(calls) == len(losses) == len(shape.layers) == 8
    # Once more, from the model itself: its router in one layer is made to choose one expert.
    for layer in (0, 7):
        router = moe_layers(model)[layer].router
        best_alone = router.register_forward_hook(alone(rules_of_layers[layer]))
        log_p = model(windows).logits[0].log_softmax(-1)
        best_alone.remove()
        kl = (reference.exp() * (reference - log_p)).sum(-1).mean()
        assert float(losses[layer]) == pytest.approx(float(kl), rel=1e-3)


def alone(rule):
    """A hook that leaves of each token's experts the best, with the weight that the model's rule gives it alone."""

    def hook(router, arguments, answer):
        logits, weights, ids = answer
        best = logits.argmax(-1, keepdim=True)
        score = logits.softmax(-1).gather(1, best)
        if rule.scores.renormalise:
            score = torch.ones_like(score)
        weights = torch.where(ids == best, score * rule.scores.scale, 0.0)
        return logits, weights, ids

    return hook
