"""Routing traces: written, read again, and refused when they are none."""

import pytest
import torch

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
