"""Free-running decode against plain loops, and its figures against literal ones."""

import math
from contextlib import nullcontext

import pytest
import torch

from cachemoe.kernels.policy import KNOBS
from cachemoe.kernels.state import Residency
from cachemoe.moe import quality
from cachemoe.moe.calibration import Calibration
from cachemoe.moe.chance import Changes
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.chooser import Chooser
from cachemoe.moe.free_running import (
    PROMPT_TOKENS,
    bootstrap_interval,
    continuation_bits,
    continuations,
    decode,
    prompts_of,
    run_freely,
)
from cachemoe.moe.layers import moe_layers, routing_rules
from cachemoe.moe.models import load_model
from cachemoe.moe.quality import Setting
from cachemoe.moe.shape import MoeShape
from cachemoe.moe.strategies import Strategy
from cachemoe.moe.swap import Swap
from cachemoe.offload.errors import InputError
from cachemoe.offload.residency import least_recently_used

pytest.importorskip("transformers")
COUNT = 12
SHAPE = MoeShape((0, 1), 8, 2, 32, 32, 256, 128)
CHANGED = ("cache-prior:0.4", "max-rank:4", "pruning:1", "naee-skip:0.9", "adap-skip:0.5", "random-swap:0.4")


@pytest.fixture(scope="module")
def shape(tiny_checkpoint):
    return Checkpoint(tiny_checkpoint).shape


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    # float64: alone and side by side, logits agree so closely that no near-tie can part routings or tokens.
    model = load_model(tiny_checkpoint, torch.float64)
    model.set_experts_implementation("eager")  # torch's grouped matmul has no float64
    return model


@pytest.fixture(scope="module")
def known(tiny_calibration):
    return Calibration.load(tiny_calibration)


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(1, 256, (3, 12), generator=torch.Generator().manual_seed(3))


def setting(text, capacity=4, shape=SHAPE):
    return Setting(Strategy.parse(text, shape.experts, shape.top_k, 1), capacity)


@torch.inference_mode()
def alone(model, shape, one, prompt, known=None, number=0):
    """One prompt's continuation by one setting, or the model's own for None: a token a call, no batch.

    Chance draws from the layer's number, and 3 more for each prompt before: the least odd number not below 2 layers.

    The prompt is one call for a rule of decode alone, which tells prompts by that.
    """
    rules = routing_rules(moe_layers(model), shape.top_k, "cpu")
    state = Residency.empty(torch.full((len(shape.layers), 1), one.capacity if one else 8), shape.experts)
    swapped = nullcontext()
    if one is not None:
        options = {"calibration": known, "gates_prompts": False}
        chooser = Chooser(rules, shape.top_k, [one.strategy], least_recently_used, **options)
        if one.strategy.name == "random-swap":
            chooser.knobs[..., KNOBS.index("seed")] = torch.tensor([[3.0 * number], [1 + 3.0 * number]])
        swapped = Swap(model, lambda layer, logits, hidden: chooser.route(layer, logits[None], state[layer]))
    whole = one is not None and one.strategy.rule.decode_only
    said, past = [], None
    with swapped:
        for tokens in [prompt[None]] if whole else prompt.view(-1, 1, 1):
            output = model(tokens, past_key_values=past, use_cache=True)
            past = output.past_key_values
        while True:
            said.append(int(output.logits[0, -1].argmax()))
            if len(said) == COUNT:
                return said
            output = model(torch.tensor([said[-1:]]), past_key_values=past, use_cache=True)


def test_every_setting_goes_on_as_a_plain_loop_of_its_own(model, shape, prompts, known, quiet):
    settings = [*(setting(text, 2 + i % 4) for i, text in enumerate(CHANGED)), setting(CHANGED[0], 5)]
    said = continuations(model, shape, prompts, COUNT, settings, least_recently_used, quiet, known)[0]
    assert said.shape == (len(settings), len(prompts), COUNT)
    own = [alone(model, shape, None, prompt) for prompt in prompts]
    for one, rows in zip(settings, said.tolist(), strict=True):
        assert rows != own, one  # or the comparison would say nothing
        for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            assert row == alone(model, shape, one, prompt, known, number), one


@pytest.mark.parametrize(
    "text", ["cache-prior:0.4", "naee-skip:0.9", "adap-skip:0.5", "pregated-exec", "decoupled-exec"]
)
def test_load_goes_on_alike(tiny_checkpoint, tiny_calibration, opened, shape, prompts, known, quiet, text):
    plain = load_model(tiny_checkpoint, torch.float32)
    plain.set_experts_implementation("eager")
    said = continuations(plain, shape, prompts, COUNT, [setting(text)], least_recently_used, quiet, known)[0][0]
    assert not torch.equal(said, decode(plain, prompts, COUNT))
    model = opened(routing=setting(text).strategy, calibration=tiny_calibration).float()
    options = {"max_new_tokens": COUNT, "min_new_tokens": COUNT, "do_sample": False, "pad_token_id": 0}
    assert model.generate(prompts[1:2], **options)[0, prompts.shape[1] :].tolist() == said[1].tolist()


def test_an_exact_setting_says_what_the_model_says(model, shape, prompts, quiet):
    settings = [
        setting(text, capacity) for capacity in (2, 5) for text in ("original", "cache-prior:0", "random-drop:0")
    ]
    own = decode(model, prompts, COUNT)
    assert own.tolist() == [alone(model, shape, None, prompt) for prompt in prompts]
    for said in continuations(model, shape, prompts, COUNT, settings, least_recently_used, quiet)[0]:
        assert torch.equal(said, own)


def test_what_is_decoded_together_changes_nothing(model, shape, prompts, quiet, monkeypatch):
    settings = [setting("cache-prior:0.4", 3), setting("cache-prior:0.4", 6), setting("random-swap:0.4")]
    arguments = (model, shape, prompts, 4, settings, least_recently_used, quiet)
    together, changes = continuations(*arguments)
    run = run_freely(*arguments)
    monkeypatch.setattr(quality, "MOST_BYTES", 1)  # one at a time
    alone, changes_alone = continuations(*arguments)
    assert torch.equal(alone, together) and changes_alone == changes
    split = run_freely(*arguments)
    assert run.controls[0].abs().max() > 0 and run.controls[2] is None
    for name in ("excess", "controls"):
        for a, b in zip(getattr(run, name), getattr(split, name), strict=True):
            assert (a is None) == (b is None)
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(run.own, split.own)


def test_chance_draws_for_each_prompt_anew(model, shape, prompts, quiet):
    same = prompts[:1].expand(4, -1)
    settings = [setting("random-swap:0.5"), setting("cache-prior:0.4")]
    (swapped, prior), _ = continuations(model, shape, same, COUNT, settings, least_recently_used, quiet)
    arguments = model, shape, same, COUNT, settings[1:], least_recently_used, quiet
    (by_chance,), _ = continuations(*arguments, changes=[(Changes(100, 100, 30), Changes(100, 100, 30))])
    for drawn in (swapped, by_chance):
        assert len(set(map(tuple, drawn.tolist()))) == 4
    assert len(set(map(tuple, prior.tolist()))) == 1
    (again, _), _ = continuations(model, shape, same, COUNT, settings, least_recently_used, quiet)
    assert torch.equal(swapped, again)


def literal_bits(model, prompt, said):
    """Bits a token: of each the probability after all before it, in a call of its own."""
    tokens, total = [*prompt.tolist(), *said.tolist()], 0.0
    with torch.inference_mode():
        for t in range(len(prompt), len(tokens)):
            logits = model(torch.tensor([tokens[:t]])).logits[0, -1].tolist()
            highest = max(logits)
            mass = sum(math.exp(z - highest) for z in logits)
            total -= (logits[tokens[t]] - highest - math.log(mass)) / math.log(2)
    return total / len(said)


def test_excess_bits_are_the_literal_difference(model, shape, prompts, quiet):
    settings = [setting("original"), setting("cache-prior:0.4"), setting("max-rank:4")]
    run = run_freely(model, shape, prompts, COUNT, settings, least_recently_used, quiet)
    assert run.excess[0] is run.controls[0] is None and run.costs(0) is None

    own = [literal_bits(model, *pair) for pair in zip(prompts, decode(model, prompts, COUNT), strict=True)]
    assert run.own.tolist() == pytest.approx(own)
    arguments = model, shape, prompts, COUNT, settings[1:], least_recently_used, quiet
    said, changes = continuations(*arguments)
    for of_prompts, of_decode in changes:
        selections = len(shape.layers) * shape.top_k * len(prompts)
        assert (of_prompts.selections, of_decode.selections) == (selections * 12, selections * (COUNT - 1))
        assert of_prompts.swaps and of_decode.swaps
    said = [*said, *continuations(*arguments, changes=changes)[0]]
    assert len({tuple(each.flatten().tolist()) for each in said}) >= 3
    for each, excess in zip(said, (*run.excess[1:], *run.controls[1:]), strict=True):
        literal = [literal_bits(model, *pair) for pair in zip(prompts, each, strict=True)]
        assert excess.tolist() == pytest.approx([a - b for a, b in zip(literal, own, strict=True)], abs=1e-9)
        assert excess.abs().max() > 1e-3
    costs = run.costs(1)
    assert costs["excess_bits"] == pytest.approx(sum(costs["excess_bits_of_prompts"]) / len(prompts))
    assert costs["excess_bits_of_prompts"] == run.excess[1].tolist()
    assert costs["control"]["excess_bits_of_prompts"] == run.controls[1].tolist()
    assert tuple(costs["interval"]) == bootstrap_interval(run.excess[1], 0)
    summary = run.summary()
    assert (summary["prompts"], summary["prompt_tokens"], summary["tokens"]) == (3, 12, COUNT)
    assert summary["own_bits"] == pytest.approx(sum(own) / 3)


def test_bits_are_those_of_the_continuation_alone(model, prompts):
    """Neither the prompt's tokens nor the model's guess after the last are among them."""
    said = decode(model, prompts, 1)
    with torch.inference_mode():
        best = model(prompts).logits[:, -1].softmax(-1).max(-1).values
    assert continuation_bits(model, prompts, said).tolist() == pytest.approx((-best.log2()).tolist())


def test_the_interval_is_that_of_a_literal_resampling():
    values, draws = [0.3, -0.1, 0.25, 0.0, 0.7, -0.4, 0.05], 999
    places = torch.randint(7, (draws, 7), generator=torch.Generator().manual_seed(5)).tolist()
    means = sorted(sum(values[place] for place in row) / 7 for row in places)

    def quantile(q):
        whole, part = divmod(q * (draws - 1), 1)
        return means[int(whole)] + part * (means[min(int(whole) + 1, draws - 1)] - means[int(whole)])

    for share in (0.5, 0.95):
        expected = quantile((1 - share) / 2), quantile((1 + share) / 2)
        assert bootstrap_interval(torch.tensor(values), 5, share, draws) == pytest.approx(expected, abs=1e-6)
    assert bootstrap_interval(torch.tensor(values), 5) == bootstrap_interval(torch.tensor(values), 5)
    assert bootstrap_interval(torch.tensor(values), 5) != bootstrap_interval(torch.tensor(values), 6)
    assert bootstrap_interval(torch.tensor([0.5] * 4), 0) == (0.5, 0.5)


def test_of_many_values_the_interval_is_that_of_the_normal_distribution():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = bootstrap_interval(values, 0)
    reach = 1.96 * float(values.std()) / 20
    assert low == pytest.approx(float(values.mean()) - reach, abs=0.1 * reach)
    assert high == pytest.approx(float(values.mean()) + reach, abs=0.1 * reach)


def test_prompts_begin_equal_parts_of_the_text():
    text = torch.arange(1003)
    cut = prompts_of(text, 5, 30, SHAPE)
    assert cut.shape == (5, PROMPT_TOKENS)
    assert cut.tolist() == [list(range(start, start + PROMPT_TOKENS)) for start in (0, 200, 400, 600, 800)]
    least = prompts_of(text[: 5 * PROMPT_TOKENS], 5, SHAPE.context - PROMPT_TOKENS, SHAPE)
    assert torch.equal(least.flatten(), text[: 5 * PROMPT_TOKENS])  # side by side, none overlaps


def test_what_text_or_context_cannot_hold_is_refused():
    text = torch.arange(1003)
    with pytest.raises(InputError, match="--free 65 after a prompt of 64 tokens is more than the 128 tokens"):
        prompts_of(text, 5, 65, SHAPE)
    with pytest.raises(InputError, match="5 prompts of 64 tokens are more than the 319 that this run has"):
        prompts_of(text[:319], 5, 10, SHAPE)
    with pytest.raises(InputError, match="--free is a number of tokens, 0 for none, not -1"):
        prompts_of(text, 5, -1, SHAPE)
    unlimited = MoeShape((0, 1), 8, 2, 32, 32, 256, None)
    assert len(prompts_of(text, 5, 10**6, unlimited)) == 5
