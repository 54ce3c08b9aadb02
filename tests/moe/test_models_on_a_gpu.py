"""What only a GPU shows of whole models: captured steps of every kind of router and cache, and waits of the host."""

from contextlib import contextmanager

import pytest
import torch
from tiny_models import VOCABULARY, save_random

from cachemoe.kernels.reference import CacheBias
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.decode_graph import WARM_UP, DecodeGraph
from cachemoe.moe.layers import moe_layers, routing_rules
from cachemoe.moe.load import load, swap
from cachemoe.moe.models import load_model, static_cache
from cachemoe.moe.routers import choose
from cachemoe.moe.swap import Swap
from cachemoe.offload.device_engine import DeviceEngine
from cachemoe.offload.errors import InputError
from cachemoe.offload.pinned import PinnedStore
from cachemoe.offload.residency import least_recently_used
from cachemoe.offload.store import ExpertStore, write_store

pytestmark = pytest.mark.gpu
PREFIX, REPLAYS = 5, 4
OURS = ("kernels/", "moe/", "offload/")  # folders of cachemoe's own code


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))


@contextmanager
def quiet(description, total):
    yield lambda: None


def decoded(name, folder):
    """``[steps, V]`` logits of a model's steps, of which the last ``REPLAYS`` are captured, and the model's own."""
    save_random(name, folder)
    checkpoint = Checkpoint(folder)
    shape, layout = checkpoint.shape, checkpoint.layout("fp32")
    write_store(folder / "store", layout, checkpoint.pages(layout.page_format))
    tokens = torch.randint(3, VOCABULARY, (PREFIX + WARM_UP + REPLAYS,), generator=torch.Generator().manual_seed(1))
    tokens, model = tokens.cuda(), load_model(folder).cuda()
    expected = model(tokens[None]).logits[0, PREFIX:]
    rules = routing_rules(moe_layers(model), shape.top_k)
    with ExpertStore(folder / "store") as file, PinnedStore(file) as store:
        engine = DeviceEngine(store, [shape.top_k + 1] * len(shape.layers), shape.top_k, "cuda")

        def route_layer(layer, logits, hidden):
            caches, out = engine.caches(layer), engine.routing(layer)
            return choose(rules[layer], logits[None], caches, least_recently_used, shape.top_k, CacheBias(), out)

        past = static_cache(model, len(tokens))
        model(tokens[None, :PREFIX], past_key_values=past, use_cache=True)
        with Swap(model, route_layer, engine.forward):
            graph = DecodeGraph(model, past)
            logits = torch.stack([graph.step(token).clone() for token in tokens[PREFIX:]])
        torch.cuda.synchronize()
    return logits, expected


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_moe",
        "deepseek_v3",
        "gpt_oss",
    ],
)
@torch.inference_mode()
def test_captured_steps_decode_as_the_model_does(tmp_path, name):
    torch.testing.assert_close(*decoded(name, tmp_path / "model"), rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_a_model_that_cannot_be_captured_is_refused_in_a_sentence(tmp_path):
    """Phi-3.5-MoE takes its rotary frequencies from the host at each step."""
    save_random("phimoe", tmp_path / "model")
    model = load_model(tmp_path / "model").cuda()
    model.set_experts_implementation("batched_mm")
    graph = DecodeGraph(model, static_cache(model, 8))
    for _ in range(WARM_UP):
        graph.step(torch.tensor(3, device="cuda"))
    with pytest.raises(InputError, match="PhimoeForCausalLM cannot be captured in a CUDA graph"):
        graph.step(torch.tensor(3, device="cuda"))


@pytest.mark.parametrize(
    ("pool", "most"),
    [
        (8, 1),
        (None, 0),
    ],
    ids=["a pool", "no pool"],
)
@torch.inference_mode()
def test_a_token_whose_experts_are_resident_hardly_waits(tmp_path, gpu, pool, most):
    """Once a layer with a pool, whose engine has to know what is missing; never where all experts are in memory."""
    if gpu is None:
        pytest.skip("waits are counted by the imitation")
    save_random("qwen3_moe", tmp_path / "model")
    if pool is None:
        model = load_model(tmp_path / "model").cuda()
        swap(model, progress=quiet)
    else:
        model, _ = load(tmp_path / "model", device="cuda", pool=pool, progress=quiet)
    tokens = torch.arange(3, 11).cuda()[None]
    past = model(tokens, use_cache=True).past_key_values
    gpu.waits.clear()
    model(tokens[:, :1], past_key_values=past, use_cache=True)
    waits = [wait for wait in gpu.waits if wait.rpartition(" ")[2].startswith(OURS)]
    model.cachemoe.close()
    assert len(waits) <= most * len(model.cachemoe.layers), waits
