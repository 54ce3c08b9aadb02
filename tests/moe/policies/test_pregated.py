"""Pre-gated routing: a layer routed by its gate on the input of the layer before, or only fetched ahead by it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import VOCABULARY, save_random

from cachemoe.kernels.state import Routing
from cachemoe.moe.layers import gates_of, moe_layers
from cachemoe.moe.models import load_model
from cachemoe.moe.quality import Setting, evaluate
from cachemoe.moe.routers import own_choice
from cachemoe.moe.sources import Ahead
from cachemoe.moe.strategies import Strategy
from cachemoe.offload import staging
from cachemoe.offload.errors import InputError
from cachemoe.offload.residency import least_recently_used

pytest.importorskip("transformers")
PROMPT = torch.randint(3, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(0))
EXEC, HINT = Strategy("pregated-exec"), Strategy("pregated-hint")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "qwen3"
    save_random("qwen3_moe", folder)
    return folder


def decoded(model, count=8):
    """Token by token: ``[count, V]`` logits."""
    past, rows = None, []
    with torch.inference_mode():
        for token in PROMPT.repeat(1, 2)[0, :count]:
            output = model(token[None, None], past_key_values=past, use_cache=True)
            past = output.past_key_values
            rows.append(output.logits[0, 0])
    return torch.stack(rows)


def watched(model):
    """What happens in order, as ("router" or "experts", layer, ids or None, input)."""
    told = []
    for number, layer in enumerate(moe_layers(model)):
        layer.router.register_forward_hook(
            lambda module, given, answer, number=number: told.append(("router", number, answer[2].clone(), given[0]))
        )
        layer.experts.register_forward_pre_hook(
            lambda module, given, number=number: told.append(("experts", number, given[1].clone(), given[0]))
        )
    return told


def test_exec_runs_what_the_next_gate_says_of_this_layers_input(folder, opened):
    model = opened(folder, routing=EXEC)
    layers, rules = moe_layers(model), model.cachemoe._rules
    told = watched(model)
    decoded(model, 3)
    assert len(told) == 3 * 2 * len(layers)
    seen = {}  # what the layer before's router saw
    for kind, number, ids, hidden in told:
        flat = hidden.reshape(-1, hidden.shape[-1])
        if kind == "router":
            source = flat if number == 0 else seen[number - 1]
            weight = layers[number].router.weight
            expected, _ = own_choice(rules[number], source @ weight.T, 2)
            assert torch.equal(ids.reshape(-1, 2).sort().values, expected.sort().values)
            seen[number] = flat


def test_a_layers_experts_are_known_and_asked_for_before_those_of_the_layer_before_run(folder, opened):
    model = opened(folder, routing=EXEC)
    engine, order = model.cachemoe.engine, []
    acquire, forward = engine.acquire, engine.forward

    def noted_acquire(layer, routing):
        order.append(("acquire", layer))
        return acquire(layer, routing)

    def noted_forward(layer, x, routing, gate_input=None):
        order.append(("forward", layer))
        return forward(layer, x, routing, gate_input)

    engine.acquire, engine.forward = noted_acquire, noted_forward
    model.cachemoe._source._acquire = noted_acquire
    decoded(model, 2)
    layers = len(moe_layers(model))
    for layer in range(layers - 1):
        assert order.index(("acquire", layer + 1)) < order.index(("forward", layer))
    assert model.cachemoe.label == "routing changed"


def test_exec_of_a_prompt_is_that_of_its_tokens(folder, opened):
    tokens = PROMPT.repeat(1, 2)[:, :8]
    with torch.inference_mode():
        whole = opened(folder, routing=EXEC, pool=8)(tokens, use_cache=False).logits[0]
    torch.testing.assert_close(decoded(opened(folder, routing=EXEC, pool=8)), whole, rtol=1e-4, atol=1e-4)


def test_a_hint_changes_no_bit_and_turns_misses_into_prefetch_hits(folder, opened, monkeypatch):
    monkeypatch.setattr(staging, "lands_in_time", lambda *_: True)
    model, plain = opened(folder, routing=HINT), opened(folder)
    assert torch.equal(decoded(model, 12), decoded(plain, 12))
    ours, theirs = model.cachemoe.counters, plain.cachemoe.counters
    assert (ours.hits, ours.misses) == (theirs.hits, theirs.misses)
    assert model.cachemoe.label == "exact"
    used = ours.prefetch_hits + ours.late_prefetches
    assert 0 < used <= ours.predicted_right
    # Layer 0 is foretold by nobody.
    assert used <= sum(layer.misses for layer in model.cachemoe.layers[1:])


def test_a_pool_without_room_refuses_to_fetch_ahead(folder, opened):
    model = opened(folder)
    with pytest.raises(InputError, match="pregated-hint fetches ahead, and this pool has no room for that"):
        model.cachemoe.routing = HINT
    assert str(model.cachemoe.routing) == "original"


def state_of(model):
    return [tensor.clone() for tensor in model.cachemoe.engine.state.tensors().values()]


@pytest.mark.parametrize("after", ["pregated-hint", "pregated-exec"])
@pytest.mark.parametrize("before", ["cache-prior:0.9", "pruning:1", "pregated-exec"])
def test_asking_for_gates_leaves_the_residency_alone(folder, opened, before, after):
    model = opened(folder, routing=HINT)
    model.cachemoe.routing = before
    decoded(model)
    resident = state_of(model)
    model.cachemoe.routing = after
    for a, b in zip(state_of(model), resident, strict=True):
        assert torch.equal(a, b)
    decoded(model)


def test_threads_take_turns_at_layers_routed_ahead(folder, opened):
    model = opened(folder, routing=EXEC, pool=4)
    prompts = torch.randint(3, VOCABULARY, (4, 1, 5), generator=torch.Generator().manual_seed(2))

    def generated(prompt):
        return model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)[0].tolist()

    alone = [generated(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            assert list(threads.map(generated, prompts)) == alone


def test_from_hint_to_exact_and_back(folder, opened):
    model = opened(folder, routing=HINT)
    assert model.cachemoe.engine.prefetcher is not None
    model.cachemoe.routing = None
    assert model.cachemoe.engine.prefetcher is None
    model.cachemoe.routing = "pregated-hint"
    assert model.cachemoe.engine.prefetcher is not None


def test_quality_of_exec_is_that_of_decode(folder):
    model = load_model(folder)
    shape = load_shape(folder)
    windows = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    settings = [Setting(Strategy("original"), 4), Setting(EXEC, 4)]
    exact, changed = evaluate(model, shape, windows, settings, least_recently_used).settings
    assert exact.kl == pytest.approx(0.0, abs=1e-6) and exact.changes.swaps == 0
    assert changed.kl > 0 and changed.changes.swaps > 0 and changed.changes.runs == exact.changes.runs


def load_shape(folder):
    from cachemoe.moe.checkpoint import Checkpoint

    return Checkpoint(folder).shape


def test_what_a_call_left_behind_is_not_used():
    routed = []

    def route(layer, logits):
        routed.append((layer, float(logits)))
        return Routing.empty(1, 1, 1)

    source = Ahead([lambda hidden: hidden] * 3, route)
    source.route(0, torch.tensor(1.0), torch.tensor(10.0))  # layer 1 ahead, from 10; then the call ends
    source.route(0, torch.tensor(2.0), torch.tensor(20.0))
    first = source.route(1, torch.tensor(-1.0), torch.tensor(30.0))
    assert routed == [(0, 1.0), (1, 10.0), (0, 2.0), (1, 20.0), (2, 30.0)]
    assert source.claim(1, first) is first  # nobody was asked


def test_a_router_that_is_no_product_cannot_be_asked_ahead(folder):
    model = load_model(folder)
    layer = moe_layers(model)[0]
    own = layer.router.forward
    layer.router.forward = lambda hidden: own(hidden.sin())
    with pytest.raises(InputError, match="does more than multiply by its weight"):
        gates_of(moe_layers(model))
