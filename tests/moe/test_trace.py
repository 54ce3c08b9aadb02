"""Routing traces: written, read again, and refused when they are none."""

import os

import pytest
import torch
from safetensors.torch import save_file

from cachemoe.moe.trace import RoutingTrace
from cachemoe.offload.errors import InputError


@pytest.fixture
def trace():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, 5, generator=generator).half()
    return RoutingTrace(logits, logits.topk(2).indices.short(), torch.arange(7, dtype=torch.int32), "abc", "tiny", 7)


def test_what_is_written_is_read(trace, tmp_path):
    trace.save(tmp_path / "folder" / "trace.safetensors")
    again = RoutingTrace.load(tmp_path / "folder" / "trace.safetensors")
    assert (again.model, again.name, again.context) == ("abc", "tiny", 7)
    for name in ("logits", "ids", "tokens"):
        assert torch.equal(getattr(again, name), getattr(trace, name))


def test_anything_else_is_refused(trace, tmp_path, tiny_checkpoint):
    with pytest.raises(InputError, match="there is no trace at"):
        RoutingTrace.load(tmp_path / "absent")
    with pytest.raises(InputError, match="not a cachemoe trace"):
        RoutingTrace.load(tiny_checkpoint / "model.safetensors")
    trace.save(tmp_path / "trace")
    data = (tmp_path / "trace").read_bytes()
    (tmp_path / "trace").write_bytes(data[:-3])
    with pytest.raises(InputError, match="not a cachemoe trace, or damaged"):
        RoutingTrace.load(tmp_path / "trace")
    (tmp_path / "trace").write_bytes(data.replace(b'version\\": 1', b'version\\": 9'))
    with pytest.raises(InputError, match="another version"):
        RoutingTrace.load(tmp_path / "trace")


@pytest.mark.parametrize(
    ("metadata", "changes", "words"),
    [
        ("[" * 100_000, {}, "not a cachemoe trace"),
        ('{"version": 1, "model": 5, "name": "tiny", "context": 7}', {}, "not a cachemoe trace"),
        ('{"version": 1, "model": "abc", "name": "tiny", "context": 7.5}', {}, "not a cachemoe trace"),
        ('["version", "model", "name", "context"]', {}, "not a cachemoe trace"),
        (None, {"logits": torch.zeros(2, 7, 5)}, "parts of another dtype"),
        ('{"version": 1, "model": "abc", "name": "tiny", "context": 0}', {}, "that cannot be"),
        (None, {"ids": torch.full((2, 7, 2), 5, dtype=torch.int16)}, "that cannot be"),
        (None, {"ids": torch.full((2, 7, 2), -1, dtype=torch.int16)}, "that cannot be"),
        (None, {"tokens": torch.zeros(6, dtype=torch.int32)}, "parts that do not fit each other"),
    ],
)
def test_a_file_that_says_it_is_a_trace_and_is_not_is_refused(tmp_path, metadata, changes, words):
    about = metadata or '{"version": 1, "model": "abc", "name": "tiny", "context": 7}'
    logits = torch.zeros(2, 7, 5, dtype=torch.float16)
    ids, tokens = torch.zeros(2, 7, 2, dtype=torch.int16), torch.zeros(7, dtype=torch.int32)
    tensors = {"logits": logits, "ids": ids, "tokens": tokens} | changes
    save_file(tensors, tmp_path / "trace", metadata={"cachemoe-trace": about})
    with pytest.raises(InputError, match=words):
        RoutingTrace.load(tmp_path / "trace")


def test_what_is_no_file_is_no_trace_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        with pytest.raises(InputError, match="there is no trace at"):
            RoutingTrace.load(tmp_path / name)
