"""What a calibration says of a model: each part against the model itself, in plain Python."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_models import VOCABULARY, calibration_of_model, save_random

from cachemoe.kernels.state import GateScores, Residency
from cachemoe.moe.calibrate import divergences, ratios, removal_order, rest_shares, threshold
from cachemoe.moe.calibration import Calibration
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.chooser import Chooser
from cachemoe.moe.fingerprint import fingerprint
from cachemoe.moe.layers import moe_layers, recorded_routers, routing_rules
from cachemoe.moe.models import load_model
from cachemoe.moe.policies import RULES
from cachemoe.moe.policies.relu_route import most_places
from cachemoe.moe.quality import Setting, evaluate
from cachemoe.moe.routers import RoutingRule, own_choice
from cachemoe.moe.strategies import Strategy
from cachemoe.offload.residency import least_recently_used

CALIBRATED = [rule.name for rule in RULES.values() if rule.thresholds or rule.offsets]
RELU_LITERAL_REFUSES = ("deepseek_v3", "phimoe")


def logits_of(seed, *shape):
    return 1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------- the threshold

SCORES = {
    "softmax": RoutingRule(GateScores()),
    "sigmoid with a correction": RoutingRule(GateScores("sigmoid", renormalise=True), logits_of(9, 8) / 10),
    "in groups": RoutingRule(GateScores("sigmoid", 4, 2, "best-two", renormalise=True), logits_of(9, 8) / 10),
    "softmax in groups": RoutingRule(GateScores(groups=4, top_groups=2)),
}


def counts_above(rule, logits, k, bound):
    """Of each token how many experts that it may choose lie above, at least one and no more than it may have."""
    values = logits if rule.correction is None else logits.sigmoid() + rule.correction
    counts = []
    for row in values.tolist():
        size = len(row) // rule.scores.groups
        groups = [row[first : first + size] for first in range(0, len(row), size)]
        worth = [sum(sorted(g)[-2:]) if rule.scores.group_score == "best-two" else max(g) for g in groups]
        best = sorted(range(len(groups)), key=lambda g: -worth[g])[: rule.scores.top_groups]
        above = sum(value > bound for g in best for value in groups[g])
        counts.append(min(max(above, 1), most_places(None, k, len(row))))
    return counts


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_above_the_threshold_tokens_have_k_experts_on_average(name, k, seed):
    rule, logits = SCORES[name], logits_of(seed, 200, 8)
    bound = threshold(rule, logits, k)
    assert sum(counts_above(rule, logits, k, bound.item())) == k * len(logits)
    assert bound.dtype == torch.float32 and bound.dim() == 0


def test_where_the_model_chooses_one_nothing_lies_above():
    logits = logits_of(0, 50, 8)
    assert not (logits > threshold(SCORES["softmax"], logits, 1)).any()


# ------------------------------------------------------------------------------------------------------ a whole model


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe", "deepseek_v3", "phimoe"])
def calibrated(request, tmp_path_factory, quiet):
    """(folder, model, checkpoint, windows, calibration) of a random model."""
    folder = tmp_path_factory.mktemp("model") / request.param
    save_random(request.param, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHEMOE_CACHE", str(folder.parent / "cache"))
        source, model = Checkpoint(folder), load_model(folder, torch.float32)
        windows = torch.randint(3, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))
        known_as = fingerprint(source, quiet)
        made = calibration_of_model(model, source, windows, known_as, request.param)
        yield folder, model, source, windows, made


@pytest.fixture(scope="module")
@torch.inference_mode()
def recorded(calibrated):
    """Of each layer its rule, logits ``[T, E]``, and the model's own ids and their scores ``[T, K]``."""
    _, model, source, windows, _ = calibrated
    k, layers = source.shape.top_k, moe_layers(model)
    rules = routing_rules(layers, k, "cpu")
    with recorded_routers(model) as answers:
        for window in windows:
            model(window[None])
    logits = [torch.cat([answer.logits for answer in each]).float() for each in answers]
    scored = [replace(rule, weigh=None) for rule in rules]
    return [(rule, each, *own_choice(s, each, k)) for rule, s, each in zip(rules, scored, logits, strict=True)]


def test_what_it_says_of_itself(calibrated):
    folder, _, source, windows, made = calibrated
    shape = source.shape
    assert (made.name, made.k, made.tokens) == (folder.name, shape.top_k, windows.numel())
    made.check(made.model, len(shape.layers), shape.experts, shape.top_k)
    made.save(folder.parent / "calibration")
    again = Calibration.load(folder.parent / "calibration")
    for name in ("ratios", "thresholds", "sensitivities", "removal", "misses"):
        assert torch.equal(getattr(again, name), getattr(made, name))


def test_its_parts_are_those_of_the_models_own_routing(calibrated, recorded):
    _, _, source, _, made = calibrated
    k, experts = source.shape.top_k, source.shape.experts
    for layer, (rule, logits, ids, weights) in enumerate(recorded):
        torch.testing.assert_close(made.ratios[layer], ratios(weights))
        torch.testing.assert_close(made.thresholds[layer], threshold(rule, logits, k))
        for capacity in range(k):
            assert made.misses[layer, capacity] == math.inf
        for capacity in range(k, experts + 1):
            recent, missed = [], 0  # the last touched first
            for token in ids.tolist():
                missed += sum(e not in recent[:capacity] for e in token)
                recent = token + [e for e in recent if e not in token]
            assert made.misses[layer, capacity].item() == pytest.approx(missed / len(ids))


@torch.inference_mode()
def test_its_sensitivities_are_nats_over_the_mean_square_of_what_is_left_out(calibrated, recorded):
    _, model, source, windows, made = calibrated
    rules = [rule for rule, *_ in recorded]
    losses = divergences(model, source.shape, rules, windows, lambda: None)
    assert (made.sensitivities >= 0).all() and made.sensitivities.isfinite().all()
    for layer, (_, _, _, weights) in enumerate(recorded):
        squares = [(sum(row[1:]) / sum(row)) ** 2 for row in weights.tolist()]
        expected = float(losses[layer]) / (sum(squares) / len(squares))
        assert made.sensitivities[layer].item() == pytest.approx(expected, rel=1e-4)


@torch.inference_mode()
def test_its_divergences_are_of_the_best_expert_alone_in_one_layer(calibrated, recorded):
    """Once more with the router's own answer changed, one layer after the other."""
    _, model, source, windows, _ = calibrated
    rules = [rule for rule, *_ in recorded]
    losses = divergences(model, source.shape, rules, windows, lambda: None)
    for number, layer in enumerate(moe_layers(model)):
        total = 0.0
        for window in windows:
            reference = model(window[None]).logits[0].double().log_softmax(-1)
            hook = layer.router.register_forward_hook(partial(best_alone, rules[number], source.shape.experts))
            log_p = model(window[None]).logits[0].double().log_softmax(-1)
            hook.remove()
            total += float((reference.exp() * (reference - log_p)).sum())
        assert float(losses[number]) == pytest.approx(total / windows.numel(), rel=1e-3, abs=1e-6)
    assert (losses > 0).all()


def best_alone(rule, experts, router, arguments, answer):
    """The router's answer with the weight that the model's rule gives the best expert alone, and 0 for the others."""
    logits = next(each for each in answer if each.is_floating_point() and each.shape[-1] == experts)
    ids = next(each for each in answer if not each.is_floating_point())
    own, weights = own_choice(rule, logits.float(), ids.shape[1])
    alone = weights[:, :1]
    if rule.scores.renormalise:
        alone = torch.full_like(alone, rule.scores.scale)
    changed = torch.where(ids == own[:, :1], alone.to(logits.dtype), 0.0)
    return tuple(changed if each.is_floating_point() and each is not logits else each for each in answer)


@torch.inference_mode()
def test_its_order_of_removal_is_of_the_models_own_experts(calibrated, recorded):
    """Their outputs computed by the model's own module, one expert at a time."""
    _, model, source, windows, made = calibrated
    for number, layer in enumerate(moe_layers(model)):
        rule, logits, _, _ = recorded[number]
        seen = []
        hook = layer.experts.register_forward_pre_hook(
            lambda module, arguments, seen=seen: seen.append(arguments[0].reshape(-1, arguments[0].shape[-1]))
        )
        for window in windows:
            model(window[None])
        hook.remove()
        hidden = torch.cat(seen)
        outputs = torch.stack(
            [
                layer.experts(hidden, torch.full((len(hidden), 1), e), torch.ones(len(hidden), 1))
                for e in range(source.shape.experts)
            ]
        )
        expected = removal_order(logits, outputs, rule, source.shape.top_k)
        assert made.removal[number].tolist() == expected.tolist()


@torch.inference_mode()
def test_on_its_text_policies_run_as_many_as_they_say(calibrated, recorded):
    """On the recorded logits; where a layer changes, the next sees other logits."""
    _, _, source, windows, made = calibrated
    k, experts, tokens = source.shape.top_k, source.shape.experts, windows.numel()
    rules = [rule for rule, *_ in recorded]

    def run(text):
        """Experts that run, a layer."""
        chooser = Chooser(rules, k, [Strategy.parse(text, experts, k)], least_recently_used, calibration=made)
        return [
            int(
                (chooser.route(layer, logits[None], Residency.empty(torch.tensor([experts]), experts)).slots >= 0).sum()
            )
            for layer, (_, logits, _, _) in enumerate(recorded)
        ]

    assert run("relu-route") == [pytest.approx(k * tokens, rel=0.01)] * len(rules)
    for q in (0.25, 0.5):
        others = tokens * (k - 1)
        assert run(f"naee-skip:{q}") == [pytest.approx(tokens + (1 - q) * others, abs=1 + 0.005 * others)] * len(rules)
    assert run("naee-skip:0") == run("adap-skip:0") == run(f"naee-prune:{experts}") == [k * tokens] * len(rules)


def test_every_policy_that_needs_it_runs(calibrated):
    folder, model, source, windows, made = calibrated
    shape = source.shape
    values = {"naee-skip": ":0.5", "naee-prune": f":{shape.experts - 2}", "adap-skip": ":0.05"}
    names = [name for name in CALIBRATED if name != "relu-literal" or folder.name not in RELU_LITERAL_REFUSES]
    assert len(names) >= 4
    settings = [Setting(Strategy.parse(name + values.get(name, ""), shape.experts, shape.top_k), 6) for name in names]
    evaluation = evaluate(model, shape, windows, settings, least_recently_used, calibration=made, controls=True)
    for setting, quality in zip(settings, evaluation.settings, strict=True):
        assert 0 < quality.kl < math.inf, setting
        assert quality.changes.selections == len(shape.layers) * windows.numel() * shape.top_k
        if setting.strategy.name in ("naee-skip", "adap-skip"):
            assert quality.changes.runs < quality.changes.selections == quality.control.changes.selections
        if setting.strategy.name == "naee-prune":
            assert quality.changes.runs == quality.changes.selections and quality.changes.swaps > 0


# ------------------------------------------------------------------------------------------------------ small matters


def test_the_share_of_all_but_the_best():
    weights = torch.tensor([[0.5, 0.3, 0.2], [2.0, 0.0, 0.0], [0.1, 0.1, 0.1]])
    torch.testing.assert_close(rest_shares(weights), torch.tensor([0.5, 0.0, 2 / 3]))
