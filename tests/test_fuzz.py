"""Damaged and hostile files: each reader gives what is right, or one ``InputError``.

``make fuzz`` runs these with many more examples.
"""

import json
import os
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from cachemoe.kernels.formats import PageFormat
from cachemoe.moe.budgets import budgets
from cachemoe.moe.calibration import Calibration
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.info import needs
from cachemoe.moe.trace import RoutingTrace
from cachemoe.offload.errors import InputError
from cachemoe.offload.store import ExpertStore, StoreLayout, write_store

pytest.importorskip("transformers")
LONG = os.environ.get("CACHEMOE_FUZZ")  # examples of each kind; the suite has the same few each time
fuzzed = settings(
    max_examples=int(LONG or "60"), derandomize=LONG is None, deadline=None, suppress_health_check=list(HealthCheck)
)
SURPRISES = st.sampled_from(
    [
        *(None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63, 2**64, 10**30, 1.5, float("nan"), float("inf")),
        *("", "x", "BF16", "F8_E8M0", "../x", "/etc/passwd", "\ud800", "a\0b", "9" * 5000),
        *([], [0], [[]], [1, 2, 3], {}, {"a": 1}),
    ]
)


def damaged_bytes(draw, content: bytes) -> bytes:
    """A file with some bytes flipped, cut, inserted, repeated or lost."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, min(len(content) - 1, 4000)))) if draw(st.booleans()) else None
        at = draw(st.integers(0, max(0, len(content) - 1))) if at is None else at
        kind = draw(st.sampled_from(["flip", "set", "cut", "insert", "repeat", "lose"]))
        size = draw(st.sampled_from([1, 2, 8, 64, 1000]))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            content[at : at + size] = bytes([draw(st.integers(0, 255))]) * min(size, len(content) - at)
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "repeat":
            content[at:at] = content[at : at + size]
        else:
            del content[at : at + size]
    return bytes(content)


def damaged_json(draw, value):
    """A JSON value with something in it replaced, renamed, lost or off by one."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)) > 0:
        key = draw(st.sampled_from(sorted(value)))
        kind = draw(st.sampled_from(["inside", "inside", "inside", "lose", "rename", "add"]))
        if kind == "inside":
            return value | {key: damaged_json(draw, value[key])}
        if kind == "lose":
            return {name: each for name, each in value.items() if name != key}
        if kind == "rename":
            other = draw(st.sampled_from([key[:-1], key + "x", key.replace("0", "1"), "", "x" * 3000]))
            return {(other if name == key else name): each for name, each in value.items()}
        return value | {draw(st.sampled_from(["x", "layers.0.experts.down_proj", "text_config"])): draw(SURPRISES)}
    if isinstance(value, list) and value and draw(st.booleans()):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], damaged_json(draw, value[at]), *value[at + 1 :]]
    if type(value) is int and draw(st.booleans()):
        return value + draw(st.sampled_from([-1, 1, 32, -64, 4096]))
    return draw(SURPRISES)


def parts(content: bytes) -> tuple[dict, bytes]:
    """A safetensors file's header, and the bytes after it."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header, data: bytes, alignment: int = 8) -> bytes:
    text = json.dumps(header).encode(errors="replace")
    text += b" " * (-(8 + len(text)) % alignment)
    return struct.pack("<Q", len(text)) + text + data


def damaged_safetensors(draw, content: bytes, alignment: int = 8) -> bytes:
    if draw(st.booleans()):
        return damaged_bytes(draw, content)
    header, data = parts(content)
    if draw(st.integers(0, 3)) == 0:  # two tensors change places, or share one
        one, other = draw(st.permutations(sorted(header)))[:2]
        header[one], header[other] = header[other], draw(st.sampled_from([header[one], header[other]]))
        return joined(header, data, alignment)
    return joined(damaged_json(draw, header), data, alignment)


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    """A checkpoint in two files, and what each file holds."""
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    folder.mkdir()
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    names = sorted(tensors)
    where = {}
    for file, members in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in members}, folder / file)
        where |= dict.fromkeys(members, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


def read_everything(folder) -> None:
    """What ``info`` and ``load`` do with a checkpoint's files; every tensor is what safetensors itself reads."""
    checkpoint = Checkpoint(folder)
    needs(checkpoint, 1e9)
    layout = checkpoint.layout()
    assert len(list(checkpoint.pages(layout.page_format))) == layout.layers * layout.experts
    for name, entry in checkpoint.tensors.entries.items():
        with safe_open(entry.file, framework="pt") as file:
            theirs = file.get_tensor(name)
        ours = checkpoint.tensors.read(name)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@fuzzed
@given(st.data())
def test_a_damaged_file_of_weights(folder, data):
    folder, files = folder
    content = damaged_safetensors(data.draw, files["a.safetensors"])
    (folder / "a.safetensors").write_bytes(content)
    try:
        read_everything(folder)
    except InputError:
        pass
    except SafetensorError as error:
        pytest.fail(f"read, where safetensors itself refuses: {error}")
    finally:
        (folder / "a.safetensors").write_bytes(files["a.safetensors"])


@fuzzed
@given(st.data(), st.sampled_from(["config.json", "model.safetensors.index.json"]))
def test_a_damaged_config_or_index(folder, data, name):
    folder, files = folder
    if data.draw(st.booleans()):
        content = damaged_bytes(data.draw, files[name])
    else:
        content = json.dumps(damaged_json(data.draw, json.loads(files[name]))).encode(errors="replace")
    (folder / name).write_bytes(content)
    try:
        read_everything(folder)
    except InputError:
        pass
    finally:
        (folder / name).write_bytes(files[name])


# -------------------------------------------------------------------------------------------------------------- stores

LAYOUT = StoreLayout("a fingerprint", 2, 3, PageFormat("int4", 32, 64, 32))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "store"
    generator = torch.Generator().manual_seed(0)
    shape = (6, LAYOUT.page_format.page_bytes)
    pages = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    write_store(path, LAYOUT, pages)
    return path, path.read_bytes(), pages


@fuzzed
@given(st.data())
def test_a_damaged_store(store, data):
    path, content, pages = store
    path.write_bytes(damaged_safetensors(data.draw, content, data.draw(st.sampled_from([8, 4096]))))
    try:
        with ExpertStore(path) as opened:
            assert isinstance(opened.layout.model, str)
        with ExpertStore(path, LAYOUT) as opened:
            for index, page in enumerate(pages):
                assert torch.equal(opened.page(*divmod(index, 3)), page)
    except InputError:
        pass


# -------------------------------------------------------------------------------------------------------------- traces


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "trace"
    logits, ids = torch.zeros(2, 5, 4, dtype=torch.float16), torch.zeros(2, 5, 2, dtype=torch.int16)
    RoutingTrace(logits, ids, torch.arange(5, dtype=torch.int32), "a model", "name", 128).save(path)
    return path, path.read_bytes()


@fuzzed
@given(st.data())
def test_a_damaged_trace(trace, data):
    path, content = trace
    path.write_bytes(damaged_safetensors(data.draw, content))
    try:
        read = RoutingTrace.load(path)
    except InputError:
        return
    assert read.logits.shape[:2] == read.ids.shape[:2] == (len(read.logits), len(read.tokens))
    assert (type(read.model), type(read.name), type(read.context)) == (str, str, int)


# -------------------------------------------------------------------------------------------------------- calibrations


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "calibration"
    misses = torch.tensor([[torch.inf, torch.inf, 2.0, 1.0, 0.5]] * 2)
    removal, token_ids = torch.arange(4, dtype=torch.int16).repeat(2, 1), torch.tensor([1, 5], dtype=torch.int32)
    numbers = torch.zeros(2, 1001), torch.zeros(2), torch.ones(2), removal, misses, token_ids
    alike, known = torch.zeros(3, 2, 4, dtype=torch.int16), torch.zeros(2, 3, 4, dtype=torch.float16)
    cheap = alike, torch.ones(2, 4), torch.zeros(9), torch.ones(4, dtype=torch.int16)
    Calibration(*numbers, known, *cheap, "a model", "name", 2, 10, "int4").save(path)
    return path, path.read_bytes()


@fuzzed
@given(st.data())
def test_a_damaged_calibration(calibration, data):
    path, content = calibration
    path.write_bytes(damaged_safetensors(data.draw, content))
    try:
        read = Calibration.load(path)
    except InputError:
        return
    layers, experts = read.removal.shape
    assert read.removal.sort(1).values.tolist() == [list(range(experts))] * layers
    assert sum(budgets(read.misses, layers * experts)) == layers * experts and read.ratio(0.5).isfinite().all()
    assert (type(read.model), type(read.name), type(read.k), type(read.tokens)) == (str, str, int, int)
