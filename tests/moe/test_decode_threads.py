"""The number of threads that a token takes: chosen by times alone, set for the token, put back after it."""

import threading

import pytest
import torch
from tiny_models import save_random

from cachemoe.moe.decode_threads import AGAIN, TRIAL, WINDOW, Choice

TOKENS = torch.randint(3, 60, (1, 60), generator=torch.Generator().manual_seed(4))


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
    choice, ones = Choice(), 0
    for length in range(4000):
        ones += choice.one
        choice.note((0.022 if choice.one else 0.014) * (1 + length / 1000))
    assert ones <= 10 * TRIAL  # a trial for each time that tokens have become slower by a third
    # What is slower for good is soon the usual.
    assert decode(choice, 500, 0.2, 0.3) <= 2 * TRIAL and not choice.one


def test_two_sequences_in_turns_are_compared_each_with_itself():
    """A trial takes turns: a long context after a short one is not what the number of threads costs."""
    choice = Choice()
    for turn in range(40):
        slower = 3 if turn % 2 else 1
        assert decode(choice, 16, 0.014 * slower, 0.022 * slower) <= TRIAL
    decode(choice, 2 * TRIAL, 0.014, 0.022)
    assert not choice.one


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(tmp_path, opened, two_threads):
    """A model in bfloat16."""
    save_random("qwen3_moe", tmp_path / "model", torch.bfloat16)
    return opened(tmp_path / "model")


@pytest.fixture
def one(monkeypatch):
    """Every token after the first takes one thread."""
    monkeypatch.setattr(Choice, "note", lambda self, seconds: setattr(self, "one", True))


def threads_of(model):
    """Appended to at each call: the threads that a layer has."""
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    return seen


@torch.inference_mode()
def test_threads_are_set_for_a_token_and_put_back(model, one):
    seen = threads_of(model)
    cache = model(TOKENS[:, :6], use_cache=True).past_key_values
    for i in range(6, 9):
        model(TOKENS[:, i : i + 1], past_key_values=cache, use_cache=True)
        assert torch.get_num_threads() == 2
    model(TOKENS[:, 9:12], past_key_values=cache, use_cache=True)
    assert seen == [2, 2, 1, 1, 2]
    torch.set_num_threads(1)
    del seen[:]
    model(TOKENS[:, :1])
    assert seen == [1] and torch.get_num_threads() == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_they_are_put_back_however_a_call_ends(model, one, error):
    model(TOKENS[:, :1])

    def fail(*_):
        assert torch.get_num_threads() == 1
        raise error

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        model(TOKENS[:, :1])
    hook.remove()
    assert torch.get_num_threads() == 2

    model.model.layers[1].register_forward_pre_hook(lambda *_: model.cachemoe.close())
    with pytest.raises(RuntimeError, match="closed"):
        model(TOKENS[:, :1])
    assert torch.get_num_threads() == 2 and "forward" not in vars(model.model)


def test_they_are_of_the_thread_that_calls(model, one):
    model(TOKENS[:, :1])
    others = []

    def ask(*_):
        thread = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
        thread.start()
        thread.join()

    model.model.layers[1].register_forward_pre_hook(ask)
    model(TOKENS[:, :1])
    assert others == [2]


def test_a_model_in_float32_keeps_its_threads(tmp_path, opened, one, two_threads):
    """Its attention sums in another order with another number of threads."""
    save_random("qwen3_moe", tmp_path / "model")
    model = opened(tmp_path / "model")
    seen = threads_of(model)
    for _ in range(3):
        model(TOKENS[:, :1])
    assert seen == [2, 2, 2]


@pytest.mark.parametrize("dense", [None, "int4"])
@torch.inference_mode()
def test_no_bit_depends_on_them(tmp_path, opened, two_threads, monkeypatch, dense):
    save_random("qwen3_moe", tmp_path / "model", torch.bfloat16)
    text = torch.randint(3, 60, (1, 400), generator=torch.Generator().manual_seed(4))
    logits = []
    for one in (False, True):
        model = opened(tmp_path / "model", dense=dense)
        monkeypatch.setattr(Choice, "note", lambda self, seconds, one=one: setattr(self, "one", one))
        output = model(text[:, :380], use_cache=True)
        rows = [output.logits]
        for i in range(380, 400):
            rows.append(model(text[:, i : i + 1], past_key_values=output.past_key_values, use_cache=True).logits)
        logits.append(torch.cat(rows, 1))
    assert torch.equal(*logits)
