"""``load(prefetch="gate")``: pages come ahead, and no output depends on it."""

import pytest
import torch

from cachemoe.offload.errors import InputError

TOKENS = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def run(model):
    output = model(TOKENS[:, :8], use_cache=True)
    logits, cache = [output.logits], output.past_key_values
    for i in range(8, 40):
        logits.append(model(TOKENS[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("dense", [None, "int8"])
def test_exact_output_is_the_same(opened, dense):
    plain, ahead = opened(dense=dense), opened(dense=dense, prefetch="gate")
    if dense is None:
        assert torch.equal(run(plain), run(ahead))
    else:  # without prefetch a layer is one call, which sums in an order of its own
        torch.testing.assert_close(run(ahead), run(plain), rtol=2e-2, atol=2e-2)
    counters = ahead.cachemoe.counters
    assert counters.prefetches > 0 and counters.prefetch_hits + counters.late_prefetches > 0
    assert counters.misses == plain.cachemoe.counters.misses and plain.cachemoe.counters.prefetches == 0


def test_what_the_biased_router_would_choose_is_asked_for(opened):
    plain, ahead = opened(routing="cache-prior:0.3"), opened(routing="cache-prior:0.3", prefetch="gate")
    assert torch.equal(run(plain), run(ahead))
    c = ahead.cachemoe.counters
    assert c.predicted > 0 and c.predicted_right > 0.3 * c.predicted
    ahead.cachemoe.routing = None  # another between two tokens, still fetched for
    before = c.prefetches
    run(ahead)
    assert ahead.cachemoe.counters.prefetches > before


def test_what_cannot_be_is_refused(opened):
    with pytest.raises(InputError, match="prefetch is gate, or left out, not 'all'"):
        opened(prefetch="all")
    with pytest.raises(InputError, match="pregated-hint asks for experts ahead itself"):
        opened(prefetch="gate", routing="pregated-hint")
