"""The models that ship with cachemoe: each is what its report says, and fits the size that models here may have."""

import json

import pytest
import torch

from cachemoe.moe.checkpoint import COARSEMOE, STEEPMOE, TINYMOE, Checkpoint
from cachemoe.moe.layers import moe_layers, recorded_routers, routing_rules
from cachemoe.moe.load import load
from cachemoe.moe.models import load_model
from cachemoe.moe.quality import NATS_PER_BIT
from cachemoe.moe.routers import own_choice
from cachemoe.moe.text import load_tokens

pytest.importorskip("transformers")
MOST_BYTES = 20_000_000
WINDOWS, CONTEXT = 8, 512  # of the 128 windows that the reports are of, so that figures agree roughly


@pytest.fixture(params=[TINYMOE, STEEPMOE, COARSEMOE], ids=lambda path: path.name)
def built_in(request):
    """A model's folder, and its report."""
    return request.param, json.loads((request.param / "report.json").read_text())


def test_its_shape_and_size_are_as_reported(built_in):
    path, report = built_in
    shape, size = Checkpoint(path).shape, (path / "model.safetensors").stat().st_size
    said = report["model"]
    assert (len(shape.layers), shape.experts, shape.top_k) == (said["layers"], said["experts"], said["k"])
    assert (shape.hidden, shape.intermediate, size) == (said["hidden"], said["intermediate"], said["bytes"])
    assert sum(file.stat().st_size for file in path.iterdir() if file.is_file()) <= MOST_BYTES
    assert Checkpoint(path).dtype == torch.bfloat16


@torch.inference_mode()
def test_its_gates_and_its_quality_are_as_reported(built_in):
    path, report = built_in
    model, shape = load_model(path), Checkpoint(path).shape
    windows = load_tokens(None, shape.vocabulary, WINDOWS * CONTEXT).view(WINDOWS, CONTEXT)
    rules, weights = routing_rules(moe_layers(model), shape.top_k, "cpu"), []
    with recorded_routers(model) as answers:
        log_p = model(windows).logits[:, :-1].float().log_softmax(-1)
    for rule, (answer,) in zip(rules, answers, strict=True):
        weights.append(own_choice(rule, answer.logits, shape.top_k)[1].float().mean(0))
    reported = torch.tensor(report["gate_weight_by_rank"])
    torch.testing.assert_close(torch.stack(weights).mean(0), reported, rtol=0, atol=0.02)
    bits = -log_p.gather(-1, windows[:, 1:, None]).mean() / NATS_PER_BIT
    assert float(bits) == pytest.approx(report["held_out"]["first_bytes_bits_per_byte"], abs=0.2)


def test_it_decodes_with_half_of_its_experts_resident(built_in, stores, quiet, monkeypatch):
    path, _ = built_in
    monkeypatch.setenv("CACHEMOE_CACHE", str(stores))
    model, tokenizer = load(path, pool="50%", device="cpu", progress=quiet)
    inputs = tokenizer("The assignment statement é\n", return_tensors="pt")
    assert inputs.input_ids[0].tolist() == list("The assignment statement é\n".encode())
    plain = load_model(path).generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0), plain)
    assert model.cachemoe.counters.misses > 0
    model.cachemoe.close()
