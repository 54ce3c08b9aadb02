"""naee-skip against its rule in plain Python."""

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

from cachemoe.moe.calibrate import ratios
from cachemoe.offload.errors import InputError

EXPERTS, TOKENS = 12, 400
each_rule = pytest.mark.parametrize("name", RULES)
each_k = pytest.mark.parametrize("k", [2, 4])


def plain_quantile(values, q):
    """With the rank between two values shared out linearly."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@each_rule
@each_k
def test_q_of_0_is_the_model_bit_for_bit(name, k):
    rule, logits = rules(EXPERTS)[name], logits_of(1, TOKENS, EXPERTS)
    known = calibration_of(rule, logits, k)
    for text in (logits, 3 * logits_of(2, TOKENS, EXPERTS)):  # also where the second are further from the best
        assert_same(routed("naee-skip:0", rule, text, k, known), routed("original", rule, text, k))


@each_rule
@each_k
@pytest.mark.parametrize("q", [0.1, 0.25, 0.5, 0.777, 1.0])
def test_on_the_calibration_text_the_share_q_is_skipped(name, k, q):
    rule, logits = rules(EXPERTS)[name], logits_of(1, TOKENS, EXPERTS)
    routing = routed(f"naee-skip:{q}", rule, logits, k, calibration_of(rule, logits, k))
    skipped = int((routing.slots < 0).sum()) / (TOKENS * (k - 1))
    assert skipped == pytest.approx(q, abs=0.005)
    assert (routing.slots[0, :, 0] >= 0).all()


@each_rule
@each_k
@pytest.mark.parametrize("q", [0.2, 0.5, 0.9])
def test_an_expert_is_skipped_if_its_weight_is_below_beta_times_the_best_ones(name, k, q):
    rule, logits, new = rules(EXPERTS)[name], logits_of(1, TOKENS, EXPERTS), logits_of(2, 150, EXPERTS)
    known = calibration_of(rule, logits, k)
    seen = []
    for z in logits.tolist():
        first, *others = shares_of(z, best_first(z, rule)[:k], rule)
        seen += [share / first for share in others]
    beta = plain_quantile(seen, q)
    assert known.ratio(q).item() == pytest.approx(beta, rel=2e-3)
    beta = known.ratio(q).item()
    routing = routed(f"naee-skip:{q}", rule, new, k, known)
    for t, z in enumerate(new.tolist()):
        chosen = best_first(z, rule)[:k]
        assert routing.ids[0, t].tolist() == chosen
        shares = shares_of(z, chosen, rule)
        expected = chosen[:1] + [e for e, w in zip(chosen[1:], shares[1:], strict=True) if not w < beta * shares[0]]
        assert ran(routing, t) == expected or any(abs(w - beta * shares[0]) < NEAR for w in shares)
        assert_weighs(routing, t, z, rule)
    assert (routing.slots < 0).any() and (routing.slots[0, :, 1:] >= 0).any()


def test_the_papers_bound_is_the_median_of_the_second_weight_over_the_first():
    rule, logits = rules(EXPERTS)["renormalised"], logits_of(1, 401, EXPERTS)
    known = calibration_of(rule, logits, 2)
    two = logits.softmax(1).topk(2).values
    assert known.ratio(0.5).item() == pytest.approx(float((two[:, 1] / two[:, 0]).median()), rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 17, 1001, 5000])
def test_quantiles_of_ratios(count):
    weights = torch.cat((torch.ones(count, 1), torch.rand(count, 1, generator=torch.Generator().manual_seed(0))), 1)
    expected = [plain_quantile(weights[:, 1].tolist(), i / 1000) for i in range(1001)]
    torch.testing.assert_close(ratios(weights), torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_of_a_model_of_one_expert_a_token_nothing_is_skipped():
    rule, logits = rules(EXPERTS)["softmax"], logits_of(1, 50, EXPERTS)
    known = calibration_of(rule, logits, 1)
    assert not known.ratios.any()
    assert_same(routed("naee-skip:0.5", rule, logits, 1, known), routed("original", rule, logits, 1))


def test_what_cannot_be_is_refused_in_a_sentence():
    rule, logits = rules(EXPERTS)["softmax"], logits_of(1, 3, EXPERTS)
    for text, words in (
        ("naee-skip", "needs its q"),
        ("naee-skip:1.1", "between 0.0 and 1.0"),
        ("naee-skip:nan", "between 0.0 and 1.0"),
        ("naee-skip:0.5,max-regret=1", "swaps no expert"),
        ("naee-skip:0.5", "naee-skip needs a calibration of the model"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            routed(text, rule, logits, 2)
        assert "\n" not in str(caught.value)
