"""A disk that fails below a loaded model: reads that raise, end early or lie give right numbers or one error."""

import os
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import save_random

from cachemoe import InputError, load
from cachemoe.moe.models import load_model

PROMPT = torch.randint(3, 96, (1, 20), generator=torch.Generator().manual_seed(9))
READ = os.preadv


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model over a store, what it computes, and the store's file."""
    folder, cache = tmp_path_factory.mktemp("faults"), tmp_path_factory.mktemp("cache")
    save_random("qwen3_moe", folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHEMOE_CACHE", str(cache))
        model, _ = load(folder / "model", pool=3, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, load_model(folder / "model")(PROMPT).logits)
        expected = model(PROMPT).logits
    (store,) = cache.glob("*.safetensors")
    yield model, expected, store
    model.cachemoe.close()


def faulty(faults):
    """``os.preadv`` with a fault for each call, as long as there are any."""
    faults = iter(faults)

    def preadv(file, buffers, offset):
        fault = next(faults, "none")
        (buffer,) = buffers
        if fault == "EIO":
            raise OSError(5, "Input/output error")
        if fault == "end":
            return 0
        if fault == "slow":
            time.sleep(0.005)
        if fault == "short":
            buffer = buffer[:4096]
        count = READ(file, [buffer], offset)
        if fault == "odd":
            return min(count, 4196)
        if fault == "flip":
            buffer[count // 2] ^= 8
        return count

    return preadv


FAULTS = st.sampled_from(["none", "none", "EIO", "end", "slow", "short", "odd", "flip"])


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(FAULTS, max_size=30))
def test_right_numbers_or_one_sentence(whole, faults):
    model, expected, _ = whole
    model.cachemoe.resize(3 + len(faults) % 2)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("cachemoe.offload.store.os.preadv", faulty(faults))
        for _ in range(2):
            try:
                logits = model(PROMPT).logits
            except InputError as error:
                assert "\n" not in str(error)
            else:
                torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("faults", [["flip"], ["flip", "none"] * 20, ["odd"] * 100, ["short"] * 100, ["slow"] * 10])
def test_what_a_second_read_mends_is_no_error(whole, faults):
    model, expected, _ = whole
    model.cachemoe.resize(4)
    model.cachemoe.resize(3)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("cachemoe.offload.store.os.preadv", faulty(faults))
        torch.testing.assert_close(model(PROMPT).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_page_that_stays_wrong_is_named(whole):
    model, expected, _ = whole
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("cachemoe.offload.store.os.preadv", faulty(["flip"] * 10_000))
        with pytest.raises(InputError, match=r"the page of layer \d, expert \d is damaged"):
            for _ in range(3):
                model(PROMPT)
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("harm", ["cut", "empty", "zeros", "removed", "replaced"])
def test_a_store_that_changes_under_a_model(whole, harm):
    model, expected, store = whole
    content = store.read_bytes()
    if harm == "cut":
        os.truncate(store, len(content) // 2 + 1234)
    elif harm == "empty":
        os.truncate(store, 0)
    elif harm == "zeros":
        with open(store, "r+b") as file:
            file.write(content[: len(content) // 3] + bytes(len(content) - len(content) // 3))
    elif harm == "removed":
        store.rename(store.with_suffix(".kept"))
    else:
        store.with_suffix(".new").write_bytes(bytes(len(content)))
        store.rename(store.with_suffix(".kept"))
        store.with_suffix(".new").rename(store)
    try:
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(model(PROMPT).logits, expected, rtol=1e-5, atol=1e-5)
        assert harm in ("removed", "replaced")  # the file that was opened is still whole
    except InputError as error:
        assert harm in ("cut", "empty", "zeros"), error
    if harm in ("removed", "replaced"):
        store.with_suffix(".kept").rename(store)
    else:
        with open(store, "r+b") as file:
            file.write(content)
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, expected, rtol=1e-5, atol=1e-5)


def test_bits_that_flip_on_the_disk_are_all_seen(whole, tmp_path):
    """Any bit of any page, its padding too."""
    _, _, path = whole
    from cachemoe.offload.store import ExpertStore

    content, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    copy = tmp_path / "copy"
    with ExpertStore(path) as opened:
        pages, page_bytes, start = opened.pages, opened.page_bytes, opened.offset(0, 0)
        experts = opened.layout.experts
    for _ in range(100):
        at = int(torch.randint(pages * page_bytes, (), generator=generator))
        damaged = bytearray(content)
        damaged[start + at] ^= 1 << (at % 8)
        copy.write_bytes(damaged)
        with ExpertStore(copy) as opened, pytest.raises(InputError, match="is damaged"):
            opened.page(*divmod(at // page_bytes, experts))


@pytest.mark.parametrize("verify", ["read", "open", "off", "sometimes"])
def test_when_pages_are_verified(whole, tmp_path, monkeypatch, verify):
    model, expected, path = whole
    monkeypatch.setenv("CACHEMOE_CACHE", str(path.parent))
    folder, content = model.config.name_or_path, path.read_bytes()
    if verify == "sometimes":
        with pytest.raises(InputError, match="verify is one of read, open, off, not 'sometimes'"):
            load(folder, verify=verify)
        return
    harmed = bytearray(content)
    for at in range(len(content) // 2, len(content) - 4096, 4096):
        harmed[at] ^= 64
    with open(path, "r+b") as file:
        file.write(harmed)
    try:
        if verify == "open":
            with pytest.raises(InputError, match="is damaged"):
                load(folder, pool=3, device="cpu", verify=verify)
            return
        again, _ = load(folder, pool=3, device="cpu", verify=verify)
        with torch.no_grad():
            if verify == "read":
                with pytest.raises(InputError, match="is damaged"):
                    again(PROMPT)
            else:
                assert not torch.equal(again(PROMPT).logits, expected)
        again.cachemoe.close()
    finally:
        with open(path, "r+b") as file:
            file.write(content)
