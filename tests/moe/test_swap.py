"""Routing and experts swapped into a transformers model."""

import pytest
import torch

from cachemoe.kernels.route import route
from cachemoe.kernels.state import GateScores, Residency
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.models import load_model
from cachemoe.moe.strategies import Strategy, policy_of
from cachemoe.moe.swap import Swap
from cachemoe.offload.engine import OffloadEngine
from cachemoe.offload.errors import InputError
from cachemoe.offload.residency import least_recently_used
from cachemoe.offload.store import ExpertStore, write_store

TOKENS = torch.tensor(list(b"Mixture of Cache-Conditional Experts, token by token."))


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return Checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint):
    # float64: batched and token-by-token logits then agree so closely that no near-tie can part their routing.
    model = load_model(checkpoint.path, torch.float64)
    model.set_experts_implementation("eager")  # torch's grouped matmul has no float64
    return model


@pytest.fixture(scope="module")
def store(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "native.safetensors"
    layout = checkpoint.layout("bf16")
    write_store(path, layout, checkpoint.pages(layout.page_format))
    with ExpertStore(path, expected=layout) as opened:
        yield opened


class Router:
    """Routes into one state and records the ids of each layer."""

    def __init__(self, shape, state, strategy="original", top_j=1):
        self.shape, self.state = shape, state
        self.policy = policy_of(Strategy.parse(strategy, shape.experts, shape.top_k, top_j))
        self.ids = [[] for _ in shape.layers]

    def __call__(self, layer, logits, hidden):
        state = self.state[layer : layer + 1]
        scores = GateScores()
        routing = route(logits[None], state, least_recently_used, self.shape.top_k, self.policy, scores)
        self.ids[layer].append(routing.ids[0])
        return routing

    def all_ids(self):
        return torch.stack([torch.cat(ids) for ids in self.ids])


def caches(shape, capacity):
    return Residency.empty(torch.full((len(shape.layers),), capacity), shape.experts)


@torch.inference_mode()
def test_original_routing_gives_the_models_own_output(model, checkpoint):
    own = model(TOKENS[None]).logits
    with Swap(model, Router(checkpoint.shape, caches(checkpoint.shape, checkpoint.shape.top_k))):
        assert torch.equal(model(TOKENS[None]).logits, own)


@torch.inference_mode()
def test_leaving_restores_the_model(model, checkpoint, store):
    own, implementation = model(TOKENS[None]).logits, model.get_experts_implementation()
    engine = OffloadEngine(store, [checkpoint.shape.top_k] * len(checkpoint.shape.layers))
    with engine, Swap(model, Router(checkpoint.shape, engine.state, "cache-prior:1"), engine.forward):
        assert not torch.equal(model(TOKENS[None]).logits, own)
    assert torch.equal(model(TOKENS[None]).logits, own)
    assert model.get_experts_implementation() == implementation
    assert not any("cachemoe" in name for module in model.modules() for name in vars(module))


@pytest.mark.parametrize("strategy", ["original", "max-rank:5", "cumsum:0.6", "cache-prior:0.3"])
@pytest.mark.parametrize("capacity", [2, 5])
@torch.inference_mode()
def test_decode_from_pages_equals_the_stepped_whole_sequence(model, checkpoint, store, strategy, capacity):
    shape = checkpoint.shape
    whole = Router(shape, caches(shape, capacity), strategy)
    with Swap(model, whole):
        logits = model(TOKENS[None]).logits[0]
    with OffloadEngine(store, [capacity] * len(shape.layers)) as engine:
        stepped, past, decoded = Router(shape, engine.state, strategy), None, []
        with Swap(model, stepped, engine.forward):
            for token in TOKENS:
                output = model(token[None, None], past_key_values=past, use_cache=True)
                past = output.past_key_values
                decoded.append(output.logits[0, 0])
        assert torch.equal(stepped.all_ids(), whole.all_ids())
        assert torch.equal(engine.state.slot_of, whole.state.slot_of)
        assert engine.counters.misses > 0
    torch.testing.assert_close(torch.stack(decoded), logits, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_prefill_in_waves_then_decode(model, checkpoint, store):
    shape, capacity = checkpoint.shape, checkpoint.shape.top_k
    with Swap(model, Router(shape, caches(shape, capacity))):
        expected = model(TOKENS[None]).logits[0]
    engine = OffloadEngine(store, [capacity] * len(shape.layers))
    with engine, Swap(model, Router(shape, engine.state), engine.forward):
        prefill = model(TOKENS[None, :-1], use_cache=True)
        last = model(TOKENS[None, -1:], past_key_values=prefill.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat((prefill.logits[0], last.logits[0])), expected, rtol=1e-5, atol=1e-5)


def test_generate_runs_through_the_engine(model, checkpoint, store):
    shape = checkpoint.shape
    own = model.generate(TOKENS[None], max_new_tokens=8, do_sample=False, pad_token_id=0)
    engine = OffloadEngine(store, [shape.top_k] * len(shape.layers))
    with engine, Swap(model, Router(shape, engine.state), engine.forward):
        swapped = model.generate(TOKENS[None], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(swapped, own)


def test_a_model_without_moe_blocks_is_refused(checkpoint):
    with pytest.raises(InputError, match="no experts that go through"):
        Swap(torch.nn.Linear(2, 2), lambda layer, logits, hidden: None)


def test_a_damaged_checkpoint_is_one_sentence(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint.path / "config.json").read_text())
    with pytest.raises(InputError, match="transformers cannot load"):
        load_model(tmp_path)
