"""Several sequences in one call of a model: all of a step see the same residency, and their order changes nothing."""

import pytest
import torch

TOKENS = torch.randint(0, 256, (4, 14), generator=torch.Generator().manual_seed(2))
CUTS = 6, 7, 8, 9, 12, 13, 14  # a prompt, tokens, a few at once, and tokens again


@torch.inference_mode()
def run(model, tokens, by_embeddings=False):
    """``[B, T, V]`` logits of sequences taken in pieces."""
    logits, first, cache = [], 0, None
    for end in CUTS:
        given = {"input_ids": tokens[:, first:end]}
        if by_embeddings:
            given = {"inputs_embeds": model.get_input_embeddings()(given["input_ids"])}
        output = model(**given, past_key_values=cache, use_cache=True)
        cache, first = output.past_key_values, end
        logits.append(output.logits)
    return torch.cat(logits, 1)


def state_of(model):
    return model.cachemoe.engine.state.tensors()


@pytest.mark.parametrize("routing", [None, "cache-prior:0.5", "pregated-hint", "pregated-exec"])
@pytest.mark.parametrize("dense", [None, "int8"])
def test_the_order_of_the_sequences_changes_nothing(opened, routing, dense):
    order = torch.tensor([2, 0, 3, 1])
    one, other = (opened(routing=routing, dense=dense) for _ in range(2))
    given, expected = run(other, TOKENS[order]), run(one, TOKENS)[order]
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    for name, tensor in state_of(one).items():
        torch.testing.assert_close(tensor, state_of(other)[name], msg=name)
    assert one.cachemoe.counters.misses == other.cachemoe.counters.misses > 0


def test_the_same_sequence_twice_is_placed_as_one(opened):
    """What both run, both touch at once: residency and misses are those of one alone."""
    one, two = (opened(routing="cache-prior:0.5") for _ in range(2))
    alone, both = run(one, TOKENS[:1]), run(two, TOKENS[:1].expand(2, -1))
    torch.testing.assert_close(both, alone.expand(2, -1, -1), rtol=1e-4, atol=1e-4)
    assert torch.equal(state_of(one)["page_of"], state_of(two)["page_of"])
    assert torch.equal(state_of(one)["last_use"], state_of(two)["last_use"])
    assert 2 * one.cachemoe.counters.selections == two.cachemoe.counters.selections


def test_embeddings_tell_the_number_of_sequences_too(opened):
    by_ids, by_embeddings = (opened(routing="cache-prior:0.5") for _ in range(2))
    assert torch.equal(run(by_ids, TOKENS), run(by_embeddings, TOKENS, by_embeddings=True))
    assert torch.equal(state_of(by_ids)["last_use"], state_of(by_embeddings)["last_use"])


def test_a_call_that_fails_leaves_nothing_behind(opened):
    model, fresh = opened(routing="cache-prior:0.5"), opened(routing="cache-prior:0.5")
    with pytest.raises(IndexError):
        model(torch.full((2, 3), 10**6))
    assert torch.equal(run(model, TOKENS[:1]), run(fresh, TOKENS[:1]))
    model.cachemoe.close()
    assert "forward" not in vars(model.base_model)


def test_ctrl_c_leaves_nothing_behind(opened):
    model, fresh = opened(routing="cache-prior:0.5"), opened(routing="cache-prior:0.5")

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(TOKENS[:3])
    hook.remove()
    assert torch.equal(run(model, TOKENS[:1]), run(fresh, TOKENS[:1]))


def test_a_default_device_of_the_user_changes_nothing(opened):
    one, other = opened(routing="cache-prior:0.5"), opened(routing="cache-prior:0.5")
    expected = run(one, TOKENS)
    torch.set_default_device("meta")
    try:
        given = run(other, TOKENS)
    finally:
        torch.set_default_device(None)
    assert torch.equal(given, expected)
