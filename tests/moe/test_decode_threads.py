"""The number of threads that a token takes: chosen by times alone, set for the token, put back after it."""

import pytest
import torch

from cachemoe.moe.decode_threads import AGAIN, TRIAL, WINDOW, Choice

TOKENS = torch.randint(0, 256, (1, 60), generator=torch.Generator().manual_seed(4))


def decode(choice, tokens, all_s, one_s):
    """Times of tokens with all threads and with one; how many took one thread."""
    ones = 0
    for _ in range(tokens):
        ones += choice.one
        choice.note(one_s if choice.one else all_s)
    return ones


def test_alone_all_threads_are_tried_against_one_once():
    choice = Choice()
    assert decode(choice, 500, 0.014, 0.022) == TRIAL and not choice.one


def test_a_small_model_takes_one_thread_and_tries_all_now_and_then():
    choice = Choice()
    decode(choice, WINDOW + TRIAL, 0.002, 0.001)
    assert choice.one
    assert 10 * AGAIN - decode(choice, 10 * AGAIN, 0.002, 0.001) <= 10 * TRIAL and choice.one


def test_another_process_comes_and_goes():
    choice = Choice()
    decode(choice, 100, 0.014, 0.022)
    decode(choice, WINDOW + TRIAL, 0.060, 0.022)
    assert choice.one
    assert decode(choice, 1000, 0.060, 0.022) > 900
    decode(choice, AGAIN + WINDOW + TRIAL, 0.014, 0.022)
    assert not choice.one
    assert decode(choice, 500, 0.014, 0.022) == 0


def test_a_context_that_grows_is_no_other_process():
    choice = Choice()
    for length in range(4000):
        choice.note((0.022 if choice.one else 0.014) * (1 + length / 1000))
    assert not choice.one
    # What is slower for good is soon the usual.
    assert decode(choice, 500, 0.2, 0.3) <= 2 * TRIAL


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_are_set_for_a_token_and_put_back(opened, two_threads, monkeypatch):
    model, seen = opened(), []
    monkeypatch.setattr(Choice, "note", lambda self, seconds: setattr(self, "one", True))
    model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    with torch.inference_mode():
        cache = model(TOKENS[:, :6], use_cache=True).past_key_values
        for i in range(6, 9):
            model(TOKENS[:, i : i + 1], past_key_values=cache, use_cache=True)
            assert torch.get_num_threads() == 2
        model(TOKENS[:, 9:12], past_key_values=cache, use_cache=True)
        assert seen == [2, 2, 1, 1, 2]
        with pytest.raises(IndexError):
            model(torch.full((1, 1), 10**6), past_key_values=cache)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    del seen[:]
    model(TOKENS[:, :1])
    assert seen == [1] and torch.get_num_threads() == 1


@pytest.mark.parametrize("dense", [None, "int4"])
def test_no_bit_depends_on_them(opened, two_threads, monkeypatch, dense):
    logits = []
    for one in (False, True):
        model = opened(dense=dense)
        monkeypatch.setattr(Choice, "note", lambda self, seconds, one=one: setattr(self, "one", one))
        with torch.inference_mode():
            output = model(TOKENS[:, :6], use_cache=True)
            rows = [output.logits]
            for i in range(6, 30):
                rows.append(model(TOKENS[:, i : i + 1], past_key_values=output.past_key_values, use_cache=True).logits)
        logits.append(torch.cat(rows, 1))
    assert torch.equal(*logits)
