"""Stores: complete or not there at all, and no damage goes unseen."""

import errno
import fcntl
import json
import os
import re
import resource
import signal
import struct
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from xxhash import xxh3_64_intdigest

from cachemoe.kernels.formats import PageFormat
from cachemoe.offload.errors import InputError
from cachemoe.offload.header import read_header
from cachemoe.offload.store import ExpertStore, StoreLayout, aligned_buffer, write_store

LAYERS, EXPERTS = 2, 3
LAYOUT = StoreLayout("a fingerprint", LAYERS, EXPERTS, PageFormat("bf16", 32, 40))


def random_pages(layout, seed=0):
    generator = np.random.default_rng(seed)
    shape = (layout.layers * layout.experts, layout.page_format.page_bytes)
    return [torch.from_numpy(page) for page in generator.integers(0, 256, shape, dtype=np.uint8)]


PAGES = random_pages(LAYOUT)


@pytest.fixture
def path(tmp_path):
    """A complete store."""
    write_store(tmp_path / "experts.safetensors", LAYOUT, PAGES)
    return tmp_path / "experts.safetensors"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(folder to scribble in, the bytes of a complete store)"""
    folder = tmp_path_factory.mktemp("stores")
    write_store(folder / "whole", LAYOUT, PAGES)
    return folder, (folder / "whole").read_bytes()


def data_start(raw):
    return 8 + struct.unpack("<Q", raw[:8])[0]


def read(store, layer, expert):
    buffer = aligned_buffer(store.page_bytes)
    store.read_into(memoryview(buffer), store.offset(layer, expert))
    return buffer.tobytes()


def assert_holds(store, pages):
    for index, page in enumerate(pages):
        assert read(store, *divmod(index, EXPERTS)) == page.numpy().tobytes()


def assert_one_sentence(error):
    assert "\n" not in str(error)
    assert ". " not in str(error)
    assert "None" not in str(error)


# ------------------------------------------------------------------------------------------------------------ reading


def test_what_is_written_can_be_read(path):
    with ExpertStore(path, LAYOUT) as store:
        assert store.layout == LAYOUT
        assert (store.pages, store.page_bytes) == (6, LAYOUT.page_format.page_bytes)
        assert_holds(store, PAGES)
        store.verify()


def test_an_int4_store_can_be_read(tmp_path):
    layout = StoreLayout("m", LAYERS, EXPERTS, PageFormat("int4", 64, 32, 32))
    pages = random_pages(layout, seed=1)
    write_store(tmp_path / "store", layout, pages)
    with ExpertStore(tmp_path / "store") as store:
        assert store.layout == layout
        assert_holds(store, pages)


def test_a_store_is_plain_safetensors(path):
    with safe_open(path, framework="np") as file:
        assert sorted(file.keys()) == ["pages", "xxh3"]
        assert np.array_equal(file.get_tensor("pages"), torch.stack(PAGES).numpy())
        assert file.get_tensor("xxh3").tolist() == [xxh3_64_intdigest(page.numpy()) for page in PAGES]


def test_pages_start_at_multiples_of_4_kib(path):
    raw = path.read_bytes()
    with ExpertStore(path) as store:
        offsets = [store.offset(layer, e) for layer in range(LAYERS) for e in range(EXPERTS)]
    assert all(offset % 4096 == 0 for offset in offsets)
    for offset, page in zip(offsets, PAGES, strict=True):
        assert raw[offset : offset + page.numel()] == page.numpy().tobytes()


@given(st.integers(1, 20000))
def test_buffers_are_aligned(size):
    buffer = aligned_buffer(size)
    assert (buffer.size, buffer.dtype, buffer.ctypes.data % 4096) == (size, np.uint8, 0)


def test_advance_is_called_for_each_page(tmp_path):
    written, verified = [], []
    write_store(tmp_path / "store", LAYOUT, PAGES, lambda: written.append(1))
    with ExpertStore(tmp_path / "store") as store:
        store.verify(lambda: verified.append(1))
    assert (len(written), len(verified)) == (6, 6)


def test_close_ends_reading_and_can_be_repeated(path):
    store = ExpertStore(path)
    store.close()
    store.close()
    with pytest.raises(RuntimeError, match="is closed"):
        read(store, 0, 0)


def refuse_direct_open(monkeypatch):
    real = os.open

    def refusing(path, flags, *rest, **kwargs):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest, **kwargs)

    monkeypatch.setattr(os, "open", refusing)


def refuse_direct_read(monkeypatch):
    real = os.preadv

    def refusing(fd, *rest):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, *rest)

    monkeypatch.setattr(os, "preadv", refusing)


@pytest.mark.parametrize("refuse", [refuse_direct_open, refuse_direct_read])
def test_plain_reads_where_o_direct_is_refused(path, monkeypatch, refuse):
    descriptors = len(os.listdir("/proc/self/fd"))
    refuse(monkeypatch)
    with ExpertStore(path) as store:
        assert store.direct is False
        assert_holds(store, PAGES)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_reads_in_pieces_are_put_together(path, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:4096]], offset))
    with ExpertStore(path) as store:
        assert_holds(store, PAGES)


# ------------------------------------------------------------------------------------------------------------- damage


def test_a_missing_store(tmp_path):
    with pytest.raises(InputError, match="there is no store at") as caught:
        ExpertStore(tmp_path / "none")
    assert_one_sentence(caught.value)


def test_a_folder_is_no_store(tmp_path):
    with pytest.raises(InputError):
        ExpertStore(tmp_path)


def test_some_other_safetensors_file_is_no_store(tmp_path):
    header = b'{"pages":{"dtype":"U8","shape":[1,1],"data_offsets":[0,1]}}'
    (tmp_path / "other").write_bytes(struct.pack("<Q", len(header)) + header + b"x")
    with pytest.raises(InputError, match="is not a cachemoe store") as caught:
        ExpertStore(tmp_path / "other")
    assert_one_sentence(caught.value)


@pytest.mark.parametrize(
    "other",
    [
        StoreLayout("another fingerprint", LAYERS, EXPERTS, LAYOUT.page_format),
        StoreLayout("a fingerprint", EXPERTS, LAYERS, LAYOUT.page_format),
        StoreLayout("a fingerprint", LAYERS, EXPERTS, PageFormat("bf16", 40, 32)),
    ],
)
def test_another_layout_than_expected(path, other):
    with pytest.raises(InputError, match="another model or format") as caught:
        ExpertStore(path, other)
    assert_one_sentence(caught.value)


@given(st.data())
def test_cut_short_anywhere(stored, data):
    folder, raw = stored
    # Within the sizes and the header, at each end of the pages and of the checksums, and anywhere.
    start = data_start(raw)
    edges = [0, 1, 7, 8, 9, start - 1, start, start + 1, start + len(PAGES) * len(PAGES[0]), len(raw) - 1]
    length = data.draw(st.sampled_from(edges) | st.integers(0, len(raw) - 1))
    (folder / "cut").write_bytes(raw[:length])
    with pytest.raises(InputError, match="cut short or damaged") as caught:
        ExpertStore(folder / "cut")
    assert_one_sentence(caught.value)


def test_longer_than_it_says(path):
    with open(path, "ab") as file:
        file.write(b"x")
    with pytest.raises(InputError):
        ExpertStore(path)


@pytest.mark.parametrize("layer, expert", [(0, 0), (0, 2), (1, 0), (1, 2)])
@pytest.mark.parametrize("where", [0, -1])
def test_verify_names_the_page_with_a_flipped_bit(stored, layer, expert, where):
    folder, raw = stored
    damaged, size = bytearray(raw), len(PAGES[0])
    damaged[data_start(raw) + (layer * EXPERTS + expert) * size + where % size] ^= 4
    (folder / "flipped").write_bytes(damaged)
    named = pytest.raises(InputError, match=f"the page of layer {layer}, expert {expert} is damaged")
    with ExpertStore(folder / "flipped") as store, named as caught:
        store.verify()
    assert_one_sentence(caught.value)


def test_verify_notices_a_flipped_bit_in_the_checksums(stored):
    folder, raw = stored
    (folder / "flipped").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with ExpertStore(folder / "flipped") as store, pytest.raises(InputError, match="layer 1, expert 2"):
        store.verify()


@given(st.data())
def test_a_changed_byte_in_the_header_is_refused_or_harmless(stored, data):
    folder, raw = stored
    at = data.draw(st.integers(0, raw.index(b"}}  ") + 2) | st.integers(0, data_start(raw) - 1))
    damaged = bytearray(raw)
    damaged[at] = data.draw(st.integers(0, 255))
    (folder / "header").write_bytes(damaged)
    try:
        store = ExpertStore(folder / "header", LAYOUT)
    except InputError:
        return
    with store:
        assert store.layout == LAYOUT
        assert_holds(store, PAGES)


def with_metadata(raw, metadata):
    """The same store with another ``__metadata__``."""
    start = data_start(raw)
    header = json.loads(raw[8:start])
    header["__metadata__"] = metadata
    text = json.dumps(header).encode().ljust(start - 8)
    return raw[:8] + text + raw[start:]


def with_field(raw, name, value):
    fields = json.loads(json.loads(raw[8 : data_start(raw)])["__metadata__"]["cachemoe"]) | {name: value}
    return with_metadata(raw, {"cachemoe": json.dumps(fields)})


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"cachemoe": "{"}, {"cachemoe": "[]"}, {"cachemoe": "7"}])
def test_metadata_of_something_else(stored, metadata):
    folder, raw = stored
    (folder / "header").write_bytes(with_metadata(raw, metadata))
    with pytest.raises(InputError, match="is not a cachemoe store") as caught:
        ExpertStore(folder / "header")
    assert_one_sentence(caught.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("layers", 3),
        ("layers", -2),
        ("experts", 4),
        ("kind", "int3"),
        ("kind", "int4"),
        ("hidden", 0),
        ("hidden", "32"),
        ("intermediate", 41 * 32),
        ("group", 32),
        ("surplus", 1),
        ("layers", "2"),
        ("experts", None),
        ("hidden", 32.0),
        ("hidden", 10**400),
        ("hidden", True),
        ("experts", 10**300),
        ("group", 0.0),
        ("activation", ["silu"]),
        ("activation", "tanh"),
        ("gated", 1),
        ("bias", "no"),
        ("model", 5),
    ],
)
def test_a_broken_layout_in_the_header(stored, name, value):
    folder, raw = stored
    (folder / "header").write_bytes(with_field(raw, name, value))
    with pytest.raises(InputError) as caught:
        ExpertStore(folder / "header")
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("version", [99, 4.0, True, "4", [4], "x" * 1000])
def test_another_version(stored, version):
    folder, raw = stored
    (folder / "header").write_bytes(with_field(raw, "version", version))
    with pytest.raises(InputError, match="of version ") as caught:
        ExpertStore(folder / "header")
    assert_one_sentence(caught.value)


def test_a_file_that_shrinks_while_it_is_opened_ends_in_an_error(path, monkeypatch):
    def read_header_then_shrink(file):
        header = read_header(file)
        os.truncate(file, os.path.getsize(file) - 8)
        return header

    monkeypatch.setattr("cachemoe.offload.store.read_header", read_header_then_shrink)
    with pytest.raises(InputError, match="cut short while it was opened") as caught:
        ExpertStore(path)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("left", [0, 100, 4096, 5000])
def test_a_file_that_shrinks_while_open_ends_in_an_error(path, left):
    with ExpertStore(path) as store:
        os.truncate(path, store.offset(1, 0) + left)
        assert read(store, 0, 2) == PAGES[2].numpy().tobytes()
        with pytest.raises(InputError, match="ended early"):
            read(store, 1, 0)


# ------------------------------------------------------------------------------------------------------------ writing


@contextmanager
def file_size_limit(size):
    """No file of this process grows beyond ``size``: a full disk, even for root."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def full_at_fsync(monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.parametrize("size", [0, 100, 4096, 20000, 4096 + 6 * 8192])
def test_a_full_disk_leaves_nothing(tmp_path, size):
    with file_size_limit(size), pytest.raises(InputError, match="cannot write the store") as caught:
        write_store(tmp_path / "store", LAYOUT, PAGES)
    assert_one_sentence(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_found_full_at_the_end_leaves_nothing(tmp_path, monkeypatch):
    full_at_fsync(monkeypatch)
    with pytest.raises(InputError, match="No space left on device") as caught:
        write_store(tmp_path / "store", LAYOUT, PAGES)
    assert_one_sentence(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [0, 5, 7])
def test_too_few_or_too_many_pages(tmp_path, count):
    with pytest.raises(ValueError, match=f"{count} pages given"):
        write_store(tmp_path / "store", LAYOUT, (PAGES * 2)[:count])
    assert list(tmp_path.iterdir()) == []


def test_a_page_of_another_size(tmp_path):
    with pytest.raises(ValueError, match="a page has 4096 bytes"):
        write_store(tmp_path / "store", LAYOUT, [*PAGES[:5], PAGES[5][:4096]])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InputError])
def test_pages_that_fail_half_way_leave_nothing(tmp_path, error):
    def failing():
        yield from PAGES[:3]
        raise error("half way")

    with pytest.raises(error, match="half way"):
        write_store(tmp_path / "store", LAYOUT, failing())
    assert list(tmp_path.iterdir()) == []


def test_pages_that_cannot_be_read_are_not_a_store_that_cannot_be_written(tmp_path):
    def failing():
        yield from PAGES[:3]
        raise OSError("the checkpoint cannot be read")

    with pytest.raises((OSError, InputError), match="the checkpoint cannot be read"):
        write_store(tmp_path / "store", LAYOUT, failing())


def test_nothing_is_there_under_its_name_before_it_is_complete(tmp_path):
    seen = []
    write_store(tmp_path / "store", LAYOUT, PAGES, lambda: seen.append((tmp_path / "store").exists()))
    assert seen == [False] * 6
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]


def test_an_existing_store_survives_a_failed_rewrite(path):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="1 pages given"):
        write_store(path, LAYOUT, random_pages(LAYOUT, seed=2)[:1])
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_an_existing_store_is_replaced_while_open(path):
    pages = random_pages(LAYOUT, seed=2)
    with ExpertStore(path) as old:
        write_store(path, LAYOUT, pages)
        assert_holds(old, PAGES)
    with ExpertStore(path) as new:
        assert_holds(new, pages)


def test_missing_folders_are_made(tmp_path):
    write_store(tmp_path / "a" / "b" / "store", LAYOUT, PAGES)
    with ExpertStore(tmp_path / "a" / "b" / "store") as store:
        store.verify()


def test_a_folder_in_its_place(tmp_path):
    (tmp_path / "store").mkdir()
    with pytest.raises(InputError, match=re.escape("cannot write the store")) as caught:
        write_store(tmp_path / "store", LAYOUT, PAGES)
    assert_one_sentence(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("name", ["file/store", "n" * 250], ids=["in a file", "long"])
def test_a_place_where_no_file_can_be(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write the store") as caught:
        write_store(tmp_path / name, LAYOUT, PAGES)
    assert_one_sentence(caught.value)
