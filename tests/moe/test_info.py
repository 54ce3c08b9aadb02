"""What a checkpoint needs, against the files themselves."""

import pytest
from safetensors.torch import load_file
from tiny_models import save_random

from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.info import needs
from cachemoe.moe.shards import Shards
from cachemoe.moe.sizes import size_of, size_text
from cachemoe.offload.errors import InputError


@pytest.fixture
def checkpoint(tmp_path):
    save_random("qwen3_moe", tmp_path / "model")
    return Checkpoint(tmp_path / "model")


def test_sizes_are_the_files(checkpoint):
    needed = needs(checkpoint)
    tensors = load_file(checkpoint.path / "model.safetensors")
    assert needed.dense == sum(t.nbytes for name, t in tensors.items() if ".experts." not in name)
    assert [row.kind for row in needed.formats] == ["fp32", "int8", "int4", "int2"]
    own = needed.formats[0]
    assert own.experts == 24 * own.page
    assert own.read_per_token == 3 * 2 * 3 * 32 * 32 * 4
    assert own.fits is own.fetched_per_token is None


def test_what_fits_is_what_a_pool_of_that_memory_holds(checkpoint):
    own = needs(checkpoint).formats[0]
    for slots in (1, 2, 5, 8):
        memory = needs(checkpoint).dense + 3 * slots * own.page + 100
        row = needs(checkpoint, memory).formats[0]
        assert row.fits == slots
        assert row.fetched_per_token == (None if slots < 2 else round(3 * 2 * (1 - slots / 8) * own.page))


def test_nothing_of_the_weights_is_read(checkpoint, monkeypatch):
    monkeypatch.setattr(Shards, "read", lambda *_: pytest.fail("a weight was read"))
    needs(Checkpoint(checkpoint.path), 1e9)


@pytest.mark.parametrize(("text", "size"), [("6GiB", 6 * 2**30), ("1.5 kb", 1500), ("800MB", 8e8), ("7b", 7)])
def test_sizes_are_read(text, size):
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["6", "GiB", "6 gigs", "-1GB", ""])
def test_other_sizes_are_refused(text):
    with pytest.raises(InputError, match="no size such as 6GiB"):
        size_of(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (123456, "123 kB"), (2.5e9, "2.5 GB"), (4e12, "4000 GB")],
)
def test_sizes_are_written(size, text):
    assert size_text(size) == text
