"""Decoding over a static cache through the device-driven engine, against transformers' own stepping."""

import pytest
import torch

from cachemoe.kernels.reference import CacheBias, GateScores
from cachemoe.kernels.route import route
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.decode_graph import WARM_UP, DecodeGraph
from cachemoe.moe.models import load_model, static_cache
from cachemoe.moe.swap import Swap
from cachemoe.offload.device_engine import DeviceEngine
from cachemoe.offload.pinned import PinnedStore
from cachemoe.offload.residency import least_recently_used
from cachemoe.offload.store import ExpertStore, write_store

PREFIX = 5


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return Checkpoint(tiny_checkpoint)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.inference_mode()
def test_exact_routing_decodes_as_the_model_does(checkpoint, tmp_path, device):
    tokens = torch.randint(0, 256, (PREFIX + WARM_UP + 8,), generator=torch.Generator().manual_seed(0)).to(device)
    model, shape = load_model(checkpoint.path).to(device), checkpoint.shape
    expected = model(tokens[None]).logits[0, PREFIX:]
    layout = checkpoint.layout("bf16")
    write_store(tmp_path / "store", layout, checkpoint.pages(layout.page_format))
    scores = GateScores()
    with ExpertStore(tmp_path / "store") as file, PinnedStore(file) as store:
        engine = DeviceEngine(store, [shape.top_k + 1] * len(shape.layers), shape.top_k, device)

        def route_layer(layer, logits, hidden):
            caches, out = engine.caches(layer), engine.routing(layer)
            return route(logits[None], caches, least_recently_used, shape.top_k, CacheBias(), scores, out=out)

        past = static_cache(model, len(tokens))
        model(tokens[None, :PREFIX], past_key_values=past, use_cache=True)
        with Swap(model, route_layer, engine.forward):
            graph = DecodeGraph(model, past)
            for token, logits in zip(tokens[PREFIX:], expected, strict=True):
                torch.testing.assert_close(graph.step(token), logits, rtol=1e-3, atol=1e-3)
        assert engine.counters.calls == len(expected) * len(shape.layers)
        assert engine.counters.misses > 0
