"""Levels of a user's model: formats and stores by level, what is counted and said, and what cannot be."""

import pytest
import torch

from cachemoe.moe.pack import store_directory
from cachemoe.offload.errors import InputError

TOKENS = torch.randint(0, 256, (1, 30), generator=torch.Generator().manual_seed(3))


def decoded(model, tokens=TOKENS[0]):
    past, rows = None, []
    with torch.inference_mode():
        for token in tokens:
            output = model(token[None, None], past_key_values=past, use_cache=True)
            past = output.past_key_values
            rows.append(output.logits)
    return torch.cat(rows)


def test_formats_of_levels_are_the_users_or_the_next_cheaper(opened, tiny_calibration):
    for format, kinds in ((None, ["bf16", "int4"]), ("bf16", ["bf16", "int4"]), (["fp32", "int8"], ["fp32", "int8"])):
        if kinds[0] == "fp32":
            model = opened(pool=8, routing="random-cheap:0.5", format=format)
        else:
            model = opened(pool=8, routing="hobbit:0.5:0.7", calibration=tiny_calibration, format=format)
        assert [each.kind for each in model.cachemoe.engine.formats] == kinds
        decoded(model)
        counters = model.cachemoe.counters
        assert counters.cheap > 0 and f"of {kinds[1]}" in str(model.cachemoe)
        assert counters.bytes_read > counters.cheap_bytes > 0


def test_stores_of_levels_can_be_named(opened, stores, tiny_calibration):
    whole = opened(pool=8, routing="hobbit:0.5:0.7", calibration=tiny_calibration)
    expected = decoded(whole)
    made = [next(store_directory().glob(f"tiny-*-{kind}*.safetensors")) for kind in ("bf16", "int4")]
    named = opened(pool=8, routing="hobbit:0.5:0.7", calibration=tiny_calibration, store=made)
    assert torch.equal(decoded(named), expected)
    for given, says in (
        (made[:1], "needs a store for each of 2 formats"),
        (made[::-1], "take no less|holds pages|int4 pages"),
    ):
        with pytest.raises(InputError, match=says):
            opened(pool=8, routing="hobbit:0.5:0.7", calibration=tiny_calibration, store=given)
    with pytest.raises(InputError, match="computes with 1 formats of pages, and 2 were given"):
        opened(pool=8, store=made)


def test_a_policy_that_changes_nothing_is_the_model_bit_for_bit(opened, tiny_calibration):
    own = decoded(opened(pool=3))
    for routing in ("hobbit:1:1", "edgemoe:0", "random-cheap:0"):
        model = opened(pool=8, routing=routing, calibration=tiny_calibration)
        assert torch.equal(decoded(model), own), routing
        assert model.cachemoe.counters.cheap == 0


@pytest.mark.parametrize("routing, pool, says", [
    ("random-cheap:0.5", 2, "random-cheap would have 1 slots for one of its levels, and a token may need 2"),
    ("hobbit:0.9:0.6", 8, "T1 of hobbit must not exceed T2"),
    ("edgemoe:2", 8, "P of edgemoe must lie between"),
    ("moec-substitute:best", 8, "likeness of moec-substitute is gate"),
])  # fmt: skip
def test_levels_that_cannot_be_are_refused(opened, tiny_calibration, routing, pool, says):
    with pytest.raises(InputError, match=says):
        opened(pool=pool, routing=routing, calibration=tiny_calibration)


@pytest.mark.parametrize("routing", ["hobbit:0.6:0.9", "edgemoe:0.02", "moec-substitute:gate"])
def test_what_needs_a_calibration_says_so(opened, routing):
    with pytest.raises(InputError, match="needs a calibration of the model"):
        opened(pool=8, routing=routing)


def test_a_cheaper_format_that_is_not_cheaper_is_refused(opened):
    with pytest.raises(InputError, match="take no less than"):
        opened(pool=8, routing="random-cheap:0.5", format=["int8", "bf16"])


def test_a_calibration_of_another_cheaper_format_is_refused(opened, tiny_calibration):
    with pytest.raises(InputError, match="measured int4 pages, and these are int8"):
        opened(pool=8, routing="edgemoe:0.02", calibration=tiny_calibration, format=["fp32", "int8"])


def test_a_pool_of_one_kind_is_not_another(opened, tiny_calibration):
    model = opened(pool=8, calibration=tiny_calibration)
    with pytest.raises(InputError, match="needs a pool of its own kind"):
        model.cachemoe.routing = "hobbit:0.6:0.9"
    model.cachemoe.routing = "moec-substitute:any"  # which takes any
    model = opened(pool=8, routing="hobbit:0.6:0.9", calibration=tiny_calibration)
    for routing in ("original", "cache-prior:0.5", "hobbit:0.2:0.4", "moec-substitute:gate"):
        model.cachemoe.routing = routing
        decoded(model, TOKENS[0, :4])
    model.cachemoe.resize(6)
    decoded(model, TOKENS[0, :4])


def test_swap_has_one_form_of_an_expert(tiny_checkpoint, tiny_calibration, quiet):
    from cachemoe.moe.load import swap
    from cachemoe.moe.models import load_model

    with pytest.raises(InputError, match="needs more than one form of an expert"):
        swap(load_model(tiny_checkpoint), routing="hobbit:0.6:0.9", calibration=tiny_calibration, progress=quiet)
