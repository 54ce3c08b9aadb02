"""Who is resident, saved and taken up by another process; and a pool that has room for all."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from cachemoe.moe.saved_residency import read_residency
from cachemoe.offload.errors import InputError
from cachemoe.offload.residency import EVICTION_POLICIES

TOKENS = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(2))


def residents(model):
    return [set(row[row >= 0].tolist()) for row in model.cachemoe.engine.state.page_of]


@torch.inference_mode()
def used(model, tokens=TOKENS):
    logits = model(tokens).logits
    return logits


@pytest.mark.parametrize("routing", [None, "cache-prior:1"])
def test_another_process_goes_on_as_the_first_would_have(opened, tmp_path, routing):
    first = opened(routing=routing)
    used(first)
    first.cachemoe.save_residency(tmp_path / "who.safetensors")
    second = opened(routing=routing, residency=tmp_path / "who.safetensors")
    assert residents(second) == residents(first) and second.cachemoe.counters.pages_read == 0
    for model in (first, second):
        model.cachemoe.reset_counters()
    assert torch.equal(used(first, TOKENS.flip(1)), used(second, TOKENS.flip(1)))
    assert first.cachemoe.counters.misses == second.cachemoe.counters.misses
    for name, tensor in first.cachemoe.engine.state.tensors().items():
        if name not in ("slot_of", "page_of"):
            assert torch.equal(tensor, getattr(second.cachemoe.engine.state, name)), name


def test_a_smaller_pool_keeps_who_was_used_last_and_a_larger_one_has_room(opened, tmp_path):
    first = opened(pool=5)
    used(first)
    first.cachemoe.save_residency(tmp_path / "who.safetensors")
    smaller = opened(pool=3, residency=tmp_path / "who.safetensors")
    for row, kept in enumerate(residents(smaller)):
        last = first.cachemoe.engine.state.last_use[row]
        assert kept == set(sorted(residents(first)[row], key=lambda e: -last[e])[:3])
    larger = opened(pool=7, residency=tmp_path / "who.safetensors")
    assert residents(larger) == residents(first)
    assert torch.equal(used(larger), used(smaller))


def test_a_pool_for_all_has_all_from_the_start(opened):
    whole, empty = opened(pool="100%"), opened(pool=7)
    assert residents(whole) == [set(range(8))] * 2 and residents(empty) == [set()] * 2
    used(whole)
    assert whole.cachemoe.counters.misses == 0 < whole.cachemoe.counters.hits


def test_of_levels_and_shared_caches_nothing_is_saved(opened, tmp_path, tiny_calibration):
    model = opened(pool=8, routing="hobbit:0.5:0.7", calibration=tiny_calibration)
    with pytest.raises(InputError, match="pools of one format, whose layers have caches of their own"):
        model.cachemoe.save_residency(tmp_path / "who.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read_is_refused_in_a_sentence(opened, tmp_path):
    with pytest.raises(InputError, match=r"there is no residency at .*: model.cachemoe.save_residency makes one"):
        opened(residency=tmp_path / "who.safetensors")
    (tmp_path / "other").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="is not a cachemoe residency, or damaged"):
        opened(residency=tmp_path / "other")
    opened().cachemoe.save_residency(tmp_path / "who.safetensors")
    with pytest.raises(InputError, match="is of another model"):
        read_residency(tmp_path / "who.safetensors", opened().cachemoe.engine.state, EVICTION_POLICIES["lru"], "else")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_checkpoint, stores, quiet):
    from cachemoe.moe.load import load

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHEMOE_CACHE", str(stores))
        model, _ = load(tiny_checkpoint, pool=4, device="cpu", progress=quiet)
    used(model)
    path = tmp_path_factory.mktemp("residency") / "who.safetensors"
    model.cachemoe.save_residency(path)
    state, fingerprint = model.cachemoe.engine.state.clone(), model.cachemoe.fingerprint
    model.cachemoe.close()
    return path, state, fingerprint


@given(
    name=st.sampled_from(["page_of", "last_use", "uses", "clock", "tokens", "range_sum"]),
    change=st.sampled_from(["negative", "large", "short", "float", "nan", "twice"]),
)
def test_numbers_that_cannot_be_are_refused(saved, tmp_path_factory, name, change):
    path, state, fingerprint = saved
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118
    own = tensors[name]
    if change == "negative":
        own.view(-1)[0] = -7
    elif change == "large":
        own.view(-1)[0] = 2**40
    elif change == "short":
        tensors[name] = own[:-1].contiguous()
    elif change == "float":
        tensors[name] = own.to(torch.float32)
    elif change == "nan":
        tensors[name] = torch.full_like(own, torch.nan, dtype=torch.float64)
    else:
        own[:] = own.flatten()[0].clone()
    damaged = tmp_path_factory.mktemp("damaged") / "who.safetensors"
    save_file(tensors, damaged, metadata)
    harmless = name in ("uses", "clock", "tokens", "range_sum", "last_use") and change in ("large", "twice")
    harmless |= (name, change) == ("range_sum", "negative")
    try:
        read = read_residency(damaged, state, EVICTION_POLICIES["lru"], fingerprint)
    except InputError as error:
        assert "is not a cachemoe residency, or damaged" in str(error)
    else:
        assert harmless and (read.last_use <= read.clock[:, None]).all()
