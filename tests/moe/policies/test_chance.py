"""The control beside a policy: as much is changed as by the policy, by chance, and weighed as the policy weighs."""

import math
from dataclasses import replace

import pytest
import torch
from literal import assert_weighs, best_first, logits_of, ran, rules, scores_of

from cachemoe.kernels.formats import PageFormat
from cachemoe.kernels.state import GateScores
from cachemoe.moe.calibration import Calibration
from cachemoe.moe.chance import Chance, Changes, changes_of, has_control
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.leveled import open_leveled
from cachemoe.moe.models import load_model
from cachemoe.moe.quality import STEPPED, Setting, evaluate
from cachemoe.moe.routers import RoutingRule
from cachemoe.moe.sizes import LevelBytes
from cachemoe.moe.strategies import Strategy
from cachemoe.offload.residency import least_recently_used

EXPERTS, TOKENS, K = 16, 3000, 4
ALL_RULES = rules(EXPERTS) | {"groups": RoutingRule(GateScores(groups=4, top_groups=2, group_score="best"))}
SKIPS = Strategy("naee-skip", 0.5)
WANTED = Changes(TOKENS * K, runs=TOKENS * K - 900, swaps=600, drops=900, cheap=1200, cheap_best=300)


def routed_by_chance(rule, logits, changes=WANTED, strategy=SKIPS, seed=0):
    chance = Chance([rule], K, [strategy], [seed])
    chance.set([changes], [Changes(TOKENS * K, TOKENS * K)])
    return chance.route(0, logits)


@pytest.mark.parametrize("name", ALL_RULES)
def test_as_much_is_changed_and_no_other_places(name):
    rule, logits = ALL_RULES[name], logits_of(1, TOKENS, EXPERTS)
    routing = routed_by_chance(rule, logits)
    levels, dropped, swapped, cheap, cheap_best = routing.slots[0].tolist(), 0, 0, 0, 0
    for t, z in enumerate(logits.tolist()):
        ranked = best_first(z, rule)
        if name == "groups":
            best = sorted(range(4), key=lambda g: (-max(z[4 * g : 4 * g + 4]), g))[:2]
            ranked = [e for e in ranked if e // 4 in best]
        ids = routing.ids[0, t].tolist()
        assert ids == sorted(ids, key=ranked.index) and len(set(ids)) == K  # none beyond the groups
        swapped += sum(level >= 0 for e, level in zip(ids, levels[t], strict=True) if e not in ranked[:K])
        dropped += levels[t].count(-1)
        cheap += levels[t][1:].count(1)
        cheap_best += levels[t][0] == 1
        assert levels[t][0] >= 0
    assert dropped == pytest.approx(900, rel=0.1) and cheap == pytest.approx(1200, rel=0.1)
    assert cheap_best == pytest.approx(300, rel=0.15)
    assert swapped == pytest.approx(600, rel=0.1)
    assert not routing.misses.count.any()


@pytest.mark.parametrize("name", ALL_RULES)
def test_a_policy_that_makes_weights_anew_has_a_control_that_does(name):
    rule, logits = ALL_RULES[name], logits_of(1, 60, EXPERTS)
    routing = routed_by_chance(rule, logits)
    assert {len(ran(routing, t)) for t in range(60)} >= {3, 4}
    for t, z in enumerate(logits.tolist()):
        assert_weighs(routing, t, z, rule)


@pytest.mark.parametrize("name", rules(EXPERTS))
def test_a_policy_that_leaves_weights_has_a_control_that_does(name):
    rule, logits = ALL_RULES[name], logits_of(1, 60, EXPERTS)
    routing = routed_by_chance(rule, logits, strategy=Strategy("moec-substitute", "any"))
    for t, z in enumerate(logits.tolist()):
        own, scores = best_first(z, rule)[:K], scores_of(z, rule)
        whole = sum(scores[e] for e in own) + rule.scores.epsilon if rule.scores.renormalise else 1.0
        rows = zip(*(each[0, t].tolist() for each in (routing.ids, routing.slots, routing.weights)), strict=True)
        for place, (e, level, weight) in enumerate(rows):
            assert weight == pytest.approx(rule.scores.scale * scores[e] / whole if level >= 0 else 0.0, rel=1e-4)
            assert place or e == own[0]  # what swaps never swaps the best


def test_weights_that_are_no_function_of_scores_are_the_models():
    weigh = lambda logits, ids: 10.0 + ids.float()  # noqa: E731
    rule, logits = replace(ALL_RULES["softmax"], weigh=weigh), logits_of(1, 60, EXPERTS)
    routing = routed_by_chance(rule, logits)
    expected = (10.0 + routing.ids).masked_fill(routing.slots < 0, 0.0)
    assert torch.equal(routing.weights, expected) and (routing.slots < 0).any()


def test_the_best_j_are_spared_and_all_others_may_go():
    logits = logits_of(1, 300, EXPERTS)
    everything = Changes(300 * K, 300 * K, swaps=300 * 2)
    routing = routed_by_chance(ALL_RULES["softmax"], logits, everything, Strategy("max-rank", 8, 2))
    for t, z in enumerate(logits.tolist()):
        own = best_first(z, ALL_RULES["softmax"])
        assert set(routing.ids[0, t].tolist()) & set(own[:K]) == set(own[:2])


def test_rows_are_drawn_alone():
    rule, logits = ALL_RULES["softmax"], logits_of(1, 50, EXPERTS)
    strategies = [Strategy("naee-skip", 0.5), Strategy("naee-skip", 0.9)]
    other = Changes(selections=100, runs=70, drops=30)
    chance = Chance([rule], K, strategies, [0, 3])
    chance.set([WANTED, other], [WANTED, other])
    together = chance.route(0, logits.repeat(2, 1))
    for row, (changes, seed) in enumerate([(WANTED, 0), (other, 3)]):
        alone = routed_by_chance(rule, logits, changes, strategies[row], seed)
        for name in ("ids", "slots", "weights"):
            assert torch.equal(getattr(together, name)[row], getattr(alone, name)[0])
    assert not torch.equal(chance.route(0, logits.repeat(2, 1)).slots, together.slots)


@pytest.mark.parametrize(
    ("changes", "j", "chances"),
    [
        (Changes(1000, 1000, 100), 1, (0, 100 / 750, 0, 0)),
        (Changes(1000, 1000, 100), 0, (0, 0.1, 0, 0)),
        (Changes(1000, 1000, 0), 4, (0, 0, 0, 0)),
        (Changes(1000, 700, 0, 300), 0, (0.4, 0, 0, 0)),
        (Changes(1000, 250, 0, 750), 0, (1, 0, 0, 0)),
        (Changes(1000, 1010, 90, 30), 0, (0.04, 0.09 / 0.96, 0, 0)),  # more than K run
        (Changes(1000, 700, 60, 300), 1, (0.4, 0.06 * 4 / 3 / 0.6, 0, 0)),  # of those swapped in some are dropped
        (Changes(1000, 900, 0, 100, 150, 25), 0, (100 / 750, 0, 150 / 750, 0.1)),
        (Changes(), 0, (0, 0, 0, 0)),
    ],
)
def test_how_likely_a_place_is_changed(changes, j, chances):
    assert changes.chances(4, j) == pytest.approx(chances)
    assert changes.nothing == (not any(chances))


def test_of_one_expert_a_token_no_place_but_the_best_is_there():
    assert Changes(100, 100, 25, 0, 0, 10).chances(1, 0) == (0, 0.25, 0, 0.1)
    assert Changes(100, 130, 0, 0).chances(1, 1) == (0, 0, 0, 0)


def test_prompts_and_decode_have_changes_of_their_own():
    rule, logits = ALL_RULES["softmax"], logits_of(1, 50, EXPERTS)
    chance = Chance([rule], K, [SKIPS], [0])
    chance.set([Changes(1000, 1000)], [Changes(1000, 250, 0, 750)])
    assert (chance.route(0, logits).slots == 0).all()
    assert (chance.route(0, logits[:1]).slots == torch.tensor([0, -1, -1, -1])).all()


def test_changes_are_those_of_a_literal_count():
    generator = torch.Generator().manual_seed(2)
    own = torch.rand(2, 40, 9, generator=generator).argsort(-1)[..., :3]
    ids = torch.rand(2, 40, 9, generator=generator).argsort(-1)[..., :4]  # of more places than K
    levels = torch.randint(-1, 3, (2, 40, 4), generator=generator)
    for row, found in enumerate(changes_of(ids, levels, own)):
        runs, swaps, drops, cheap, cheap_best = 0, 0, 0, 0, 0
        for t in range(40):
            level_of = dict(zip(ids[row, t].tolist(), levels[row, t].tolist(), strict=True))
            run, mine = {e for e, level in level_of.items() if level >= 0}, set(own[row, t].tolist())
            others, absent = len(run - mine), len(mine - run)
            runs, swaps, drops = runs + len(run), swaps + min(others, absent), drops + max(0, absent - others)
            first, *rest = level_of.values()
            cheap, cheap_best = cheap + sum(level > 0 for level in rest), cheap_best + (first > 0)
        assert found == Changes(120, runs, swaps, drops, cheap, cheap_best)


def test_who_has_a_control():
    for text in ("original", "cache-prior:0", "random-drop:0.5", "random-swap:0.5", "random-cheap:0.5", "hobbit:1:1"):
        assert not has_control(Strategy.parse(text, 8, 2)), text
    for text in ("cache-prior:0.5", "hobbit:0.4:0.7", "pruning:1", "moec-substitute:any", "smola-lowrank:2"):
        assert has_control(Strategy.parse(text, 8, 2)), text


def test_beside_each_policy_as_much_is_changed_on_the_same_text(tiny_checkpoint, tiny_calibration, quiet):
    checkpoint, known = Checkpoint(tiny_checkpoint), Calibration.load(tiny_calibration)
    model, shape = load_model(tiny_checkpoint, torch.float32), checkpoint.shape
    model.set_experts_implementation("eager")  # which of so few tokens is the fastest
    windows, calls = torch.randint(0, 256, (2 * STEPPED, 120), generator=torch.Generator().manual_seed(5)), []
    texts = ("original", "naee-skip:0.5", "pruning:1", "cache-prior:0.5", "max-rank:6", "random-drop:0.3")
    texts += ("moec-substitute:any", "smola-lowrank:2", "hobbit:0.3:0.6", "edgemoe:0.9", "readme-lookahead:1")
    texts += ("relu-route", "pregated-exec", "naee-prune:6", "latency-ratio:0.5")
    settings = [Setting(Strategy.parse(text, shape.experts, shape.top_k, 1), 4) for text in texts]
    formats: list[PageFormat] = [checkpoint.page_format(kind) for kind in (None, "int4")]
    computing = [shape.experts] * len(shape.layers)
    with open_leveled(checkpoint, formats, computing, quiet, ranks=[2]) as leveled:
        sizes = LevelBytes([each.page_bytes for each in formats], leveled.surrogate_bytes())
        options = {"calibration": known, "controls": True, "progress": lambda: calls.append(1)}
        options |= {"leveled": leveled, "level_bytes": sizes}
        evaluation = evaluate(model, shape, windows, settings, least_recently_used, **options)
    assert len(calls) == len(windows)
    of = dict(zip(texts, evaluation.settings, strict=True))
    for text in ("original", "random-drop:0.3", "readme-lookahead:1"):
        assert of[text].control is None and of[text].costs(evaluation.unmodified)["control"] is None
    for text, quality in of.items():
        if (control := quality.control) is None:
            continue
        mine, chance = quality.changes, control.changes
        assert chance.selections == mine.selections and control.tokens == quality.tokens
        assert control.tokens == (2 if text.startswith(("hobbit", "edgemoe")) else 8) * 119, text
        for name in ("swaps", "drops", "cheap", "cheap_best"):
            wanted, found = getattr(mine, name), getattr(chance, name)
            assert found == pytest.approx(wanted, abs=4 * math.sqrt(wanted)), (text, name)
        costs = quality.costs(evaluation.unmodified)
        assert costs["control"]["kl_nats"] == pytest.approx(control.kl / control.tokens) and control.kl > 0
        more = torch.cat(quality.divergences) - torch.cat(control.divergences)
        assert costs["control"]["kl_difference"] == pytest.approx(costs["kl_nats"] - costs["control"]["kl_nats"])
        blocks = [block.mean() for window in more.split(119) for block in (window[:64], window[64:])]
        error = float(torch.stack(blocks).std()) / len(blocks) ** 0.5
        assert costs["control"]["kl_difference_standard_error"] == pytest.approx(error)
    assert of["naee-skip:0.5"].changes.drops and of["relu-route"].changes.drops
    assert not of["relu-route"].changes.swaps  # of any token as many of the best as it has: fewer than K, or more
    assert of["relu-route"].changes.runs > of["relu-route"].changes.selections - of["relu-route"].changes.drops
    assert of["edgemoe:0.9"].changes.cheap_best and of["hobbit:0.3:0.6"].changes.cheap
    assert of["hobbit:0.3:0.6"].changes.drops
    assert of["smola-lowrank:2"].changes.cheap and of["moec-substitute:any"].changes.swaps
