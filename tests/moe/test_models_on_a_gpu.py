"""What only a GPU shows of whole models: those that cannot be captured, and waits of the host."""

from contextlib import contextmanager

import pytest
import torch
from tiny_models import save_random

from cachemoe.moe.decode_graph import WARM_UP, DecodeGraph
from cachemoe.moe.load import load, swap
from cachemoe.moe.models import load_model, static_cache
from cachemoe.offload.errors import InputError

pytestmark = pytest.mark.gpu
OURS = ("kernels/", "moe/", "offload/")  # folders of cachemoe's own code


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))


@contextmanager
def quiet(description, total):
    yield lambda: None


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
    [(8, 1), (None, 0)],
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
