"""Packing checkpoints: what pages hold, how far rounding goes, and that a failure leaves nothing."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cachemoe.moe import pack as module
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.fingerprint import fingerprint
from cachemoe.moe.pack import open_packed, pack
from cachemoe.offload.errors import InputError
from cachemoe.offload.store import ExpertStore


@contextmanager
def quiet(description, total):
    yield lambda: None


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return Checkpoint(tiny_checkpoint)


def test_pages_as_they_are_have_no_rounding_error(checkpoint, tmp_path):
    assert pack(checkpoint, checkpoint.layout(), tmp_path / "store", quiet) is None
    with ExpertStore(tmp_path / "store") as store:
        store.verify()


@pytest.mark.parametrize("kind", ["int8", "int4", "int2", "fp16"])
def test_the_rounding_error_is_the_weights(checkpoint, tmp_path, kind):
    layout = checkpoint.layout(kind)
    rounding = pack(checkpoint, layout, tmp_path / "store", quiet)
    for layer, error in enumerate(rounding):
        different = squared = 0.0
        for e in range(8):
            weights = checkpoint.expert(layer, e)
            views = layout.page_format.views(layout.page_format.pack(**weights))
            for name in ("gate_up", "down"):
                rounded = layout.page_format.dequantized(views, name)
                different += float((rounded - weights[name].float()).square().sum())
                squared += float(weights[name].float().square().sum())
        assert error == pytest.approx((different / squared) ** 0.5, rel=1e-5)
    most = {"int8": 0.02, "int4": 0.15, "int2": 0.35}
    assert (0 < max(rounding) < most[kind]) if kind in most else max(rounding) == 0


@pytest.mark.parametrize("kind", [None, "int4"])
def test_a_failure_leaves_nothing(checkpoint, tmp_path, monkeypatch, kind):
    layout, read = checkpoint.layout(kind), checkpoint.expert

    def fails(layer, e):
        if (layer, e) == (1, 3):
            raise InputError("a tensor is missing")
        return read(layer, e)

    monkeypatch.setattr(checkpoint, "expert", fails)
    with pytest.raises(InputError, match="a tensor is missing"):
        pack(checkpoint, layout, tmp_path / "folder" / "store", quiet)
    assert list((tmp_path / "folder").iterdir()) == []


def test_too_small_a_disk_is_refused_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"needs 0\.00 GB and .* has 0\.00 GB free: make room"):
        pack(checkpoint, checkpoint.layout(), tmp_path / "store", quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cachemoe.offload.store.os.fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        pack(checkpoint, checkpoint.layout(), tmp_path / "store", quiet)
    assert list(tmp_path.iterdir()) == []


def test_formats_of_one_checkpoint_lie_side_by_side(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))
    for kind in (None, "int8", "int4", "int2"):
        with open_packed(checkpoint, checkpoint.layout(kind), quiet) as store:
            assert store.layout == replace(checkpoint.layout(kind), model=fingerprint(checkpoint, quiet))
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 4


def test_one_expert_in_memory_at_a_time(checkpoint, tmp_path, monkeypatch):
    alive = []
    read = checkpoint.expert

    def watched(layer, e):
        import gc
        import weakref

        gc.collect()
        assert sum(reference() is not None for reference in alive) <= 2, "earlier experts are still held"
        weights = read(layer, e)
        alive.append(weakref.ref(weights["gate_up"]))
        return weights

    monkeypatch.setattr(checkpoint, "expert", watched)
    pack(checkpoint, checkpoint.layout("int8"), tmp_path / "store", quiet)
    assert len(alive) == 16
    assert torch.isfinite(torch.tensor(1.0))
