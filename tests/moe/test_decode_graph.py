"""Decoding over a static cache through the device-driven engine, against transformers' own stepping."""

import pytest
import torch
from tiny_models import VOCABULARY, save_random

from cachemoe.kernels.reference import CacheBias, GateScores
from cachemoe.kernels.route import route
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.decode_graph import WARM_UP, DecodeGraph
from cachemoe.moe.layers import moe_layers, routing_rules
from cachemoe.moe.models import load_model, static_cache
from cachemoe.moe.routers import choose
from cachemoe.moe.swap import Swap
from cachemoe.offload.device_engine import DeviceEngine
from cachemoe.offload.pinned import PinnedStore
from cachemoe.offload.residency import least_recently_used
from cachemoe.offload.store import ExpertStore, write_store

pytest.importorskip("transformers")
PREFIX = 5
# With a correction, a window, groups, biases, a convolution's cache, experts beside the routed ones.
GRAPHS = ["deepseek_v3", "gpt_oss", "deepseek_v2 in groups", "lfm2_moe", "qwen2_moe"]


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return Checkpoint(tiny_checkpoint)


every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@every_device
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


@pytest.mark.parametrize("name", GRAPHS)
@torch.inference_mode()
def test_every_architecture_decodes_as_the_model_does(name, tmp_path):
    """By the rule that its router was found to follow; gpt-oss beyond its window of 16 tokens."""
    save_random(name, tmp_path / "model")
    checkpoint, model = Checkpoint(tmp_path / "model"), load_model(tmp_path / "model")
    shape = checkpoint.shape
    tokens = torch.randint(3, VOCABULARY, (PREFIX + WARM_UP + 16,), generator=torch.Generator().manual_seed(0))
    expected = model(tokens[None]).logits[0, PREFIX:]
    layout = checkpoint.layout("fp32")
    write_store(tmp_path / "store", layout, checkpoint.pages(layout.page_format))
    with ExpertStore(tmp_path / "store") as file, PinnedStore(file) as store:
        rules = routing_rules(moe_layers(model), shape.top_k)
        engine = DeviceEngine(store, [shape.top_k + 1] * len(shape.layers), shape.top_k)

        def route_layer(layer, logits, hidden):
            caches, out = engine.caches(layer), engine.routing(layer)
            return choose(rules[layer], logits[None], caches, least_recently_used, shape.top_k, CacheBias(), out)

        past = static_cache(model, len(tokens))
        model(tokens[None, :PREFIX], past_key_values=past, use_cache=True)
        with Swap(model, route_layer, engine.forward):
            graph = DecodeGraph(model, past)
            for token, logits in zip(tokens[PREFIX:], expected, strict=True):
                torch.testing.assert_close(graph.step(token), logits, rtol=1e-4, atol=1e-4)
