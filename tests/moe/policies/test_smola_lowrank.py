"""Surrogates instead of misses: where they run, what they cost, and that the whole rank is the model."""

import pytest
import torch
from literal import RULES, best_first, logits_of, routed, rules

from cachemoe.kernels.state import Residency
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.surrogates import bytes_of, open_surrogates
from cachemoe.offload.errors import InputError

EXPERTS, K = 12, 4
TOKENS = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(1))


def with_surrogates(full):
    state, everyone = Residency.empty(torch.tensor([full]), EXPERTS, (EXPERTS,)), torch.arange(EXPERTS)
    state.slot_of[0, EXPERTS:], state.page_of[0, :EXPERTS] = everyone, EXPERTS + everyone
    return state


@pytest.mark.parametrize("name", RULES)
def test_all_but_the_best_run_as_surrogates_where_they_are_absent(name):
    rule, logits, state = rules(EXPERTS)[name], logits_of(1, 300, EXPERTS), with_surrogates(5)
    for z in logits:
        whole = {e for e in range(EXPERTS) if state.slot_of[0, e] >= 0}
        routing = routed("smola-lowrank:3", rule, z[None], K, state=state)
        chosen = best_first(z.tolist(), rule)[:K]
        assert routing.ids[0, 0].tolist() == chosen
        expected = [int(place > 0 and e not in whole) for place, e in enumerate(chosen)]
        assert state.levels_of(routing.slots[0, 0]).tolist() == expected
        assert int(routing.misses.count) == int(chosen[0] not in whole)
    assert torch.equal(state.slot_of[0, EXPERTS:], torch.arange(EXPERTS))  # the surrogates never leave


def test_the_more_rank_the_nearer_the_model(opened):
    with torch.inference_mode():
        own, errors = opened(pool=8)(TOKENS).logits, []
        for rank in (0, 4, 12):
            model = opened(pool=8, routing=f"smola-lowrank:{rank}")
            errors.append(float((model(TOKENS).logits - own).square().mean()))
            assert model.cachemoe.label == "precision changed" and model.cachemoe.counters.cheap > 10
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.7 * errors[0]


def test_the_surrogates_bytes_are_taken_from_the_pool(opened, tiny_checkpoint, quiet):
    taken = bytes_of(open_surrogates(Checkpoint(tiny_checkpoint), 1, quiet))
    model = opened(pool=6, routing="smola-lowrank:1")
    page = model.cachemoe.engine.page_format.page_bytes
    assert model.cachemoe.engine.state.capacity.tolist() == [int((6 * page - taken) / page)] * 2
    assert "surrogates of rank 1" in str(model.cachemoe)


def test_they_are_made_once(opened, tiny_checkpoint, quiet, monkeypatch):
    opened(pool=6, routing="smola-lowrank:1")
    monkeypatch.setattr("cachemoe.moe.surrogates.low_rank", None)  # nobody factors again
    made = open_surrogates(Checkpoint(tiny_checkpoint), 1, quiet)
    assert len(made) == 2


@pytest.mark.parametrize("routing, pool, says", [
    ("smola-lowrank:33", 8, "ranks of 0 to 32, and 33 was asked for"),
    ("smola-lowrank:32", 2, "smola-lowrank would have 0 slots for one of its levels"),
    ("smola-lowrank", 8, "needs its r"),
    ("smola-lowrank:1.5", 8, "needs its r"),
])  # fmt: skip
def test_ranks_that_cannot_be_are_refused(opened, routing, pool, says):
    with pytest.raises(InputError, match=says):
        opened(pool=pool, routing=routing)


def test_another_rank_needs_another_pool(opened):
    model = opened(pool=8, routing="smola-lowrank:1")
    with pytest.raises(InputError, match="needs a pool of its own kind"):
        model.cachemoe.routing = "smola-lowrank:2"
    model.cachemoe.routing = "original"
    with torch.inference_mode():
        model(TOKENS)
