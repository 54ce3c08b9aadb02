"""Decoding over a static cache through the device-driven engine, against transformers' own stepping."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from tiny_models import VOCABULARY, save_random

from cachemoe.kernels.policy import ORIGINAL
from cachemoe.kernels.route import route
from cachemoe.kernels.state import GateScores
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


GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def decoded(model, checkpoint, kind, tokens, folder, choose_experts):
    """``[steps, V]`` logits of the tokens after the prefix, by the device-driven engine, and its counters.

    Args:
        choose_experts: (layer, logits, its caches, where the routing goes) -> ``Routing``.
    """
    shape, layout = checkpoint.shape, checkpoint.layout(kind)
    write_store(folder / "store", layout, checkpoint.pages(layout.page_format))
    with ExpertStore(folder / "store") as file, PinnedStore(file) as store:
        engine = DeviceEngine(store, [shape.top_k + 1] * len(shape.layers), shape.top_k, model.device)

        def route_layer(layer, logits, hidden):
            return choose_experts(layer, logits[None], engine.caches(layer), engine.routing(layer))

        past = static_cache(model, len(tokens))
        model(tokens[None, :PREFIX], past_key_values=past, use_cache=True)
        with Swap(model, route_layer, engine.forward):
            graph = DecodeGraph(model, past)
            logits = torch.stack([graph.step(token).clone() for token in tokens[PREFIX:]])
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return logits, engine.counters


@pytest.mark.parametrize("device", ["cpu", GPU])
@torch.inference_mode()
def test_exact_routing_decodes_as_the_model_does(checkpoint, tmp_path, device):
    tokens = torch.randint(0, 256, (PREFIX + WARM_UP + 8,), generator=torch.Generator().manual_seed(0)).to(device)
    model, shape = load_model(checkpoint.path).to(device), checkpoint.shape
    expected = model(tokens[None]).logits[0, PREFIX:]
    scores = GateScores()

    def choose_experts(layer, logits, caches, out):
        return route(logits, caches, least_recently_used, shape.top_k, ORIGINAL, scores, out=out)

    logits, counters = decoded(model, checkpoint, "bf16", tokens, tmp_path, choose_experts)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert counters.calls == len(expected) * len(shape.layers)
    assert counters.misses > 0


@pytest.mark.parametrize(
    ("name", "device", "tolerance"),
    [(name, "cpu", 1e-4) for name in GRAPHS]
    + [pytest.param(name, "cuda", 1e-3, marks=pytest.mark.gpu) for name in ("qwen3_moe", "deepseek_v3", "gpt_oss")],
)
@torch.inference_mode()
def test_every_architecture_decodes_as_the_model_does(name, device, tolerance, tmp_path):
    """By the rule that its router was found to follow; gpt-oss beyond its window of 16 tokens."""
    save_random(name, tmp_path / "model")
    checkpoint, model = Checkpoint(tmp_path / "model"), load_model(tmp_path / "model").to(device)
    tokens = torch.randint(3, VOCABULARY, (PREFIX + WARM_UP + 16,), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(device)
    expected = model(tokens[None]).logits[0, PREFIX:]
    top_k = checkpoint.shape.top_k
    rules = routing_rules(moe_layers(model), top_k)

    def choose_experts(layer, logits, caches, out):
        return choose(rules[layer], logits, caches, least_recently_used, top_k, ORIGINAL, out)

    logits, _ = decoded(model, checkpoint, "fp32", tokens, tmp_path, choose_experts)
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@torch.inference_mode()
def test_a_model_on_a_second_gpu_is_captured_there():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")

    def count(token, past_key_values, use_cache):
        return SimpleNamespace(logits=past_key_values.add_(token).clone())

    for device in map(torch.device, ("cuda:0", "cuda:1")):  # torch keeps a stream for captures on the first
        model, total = Mock(side_effect=count, device=device), torch.zeros(1, 1, 3, dtype=torch.int64, device=device)
        graph = DecodeGraph(model, total)
        steps = [graph.step(token).clone() for token in torch.arange(1, WARM_UP + 4, device=device)]
        assert [int(step[0]) for step in steps] == [1, 3, 6, 10, 15]
        assert model.call_count == WARM_UP + 1  # the rest were replayed
