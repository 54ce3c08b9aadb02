"""load and what it gives: any architecture, the model's own output from a pool, and what is refused."""

import pytest
import torch
from tiny_models import MODELS, VOCABULARY, save_random

from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.load import load, swap
from cachemoe.moe.strategies import CachePrior, CumSum, MaxRank
from cachemoe.moe.swap import load_model, moe_layers

transformers = pytest.importorskip("transformers")
every_model = pytest.mark.parametrize("name", MODELS)
PADDED = torch.tensor([[0] * 5 + [1] * 15, [1] * 20, [0] * 9 + [1] * 11, [0] + [1] * 19])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name -> the folder of a random model, made when first asked for."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("checkpoints") / name.replace(" ", "-")
            save_random(name, folders[name])
        return folders[name]

    return folder


def prompt(batch):
    return torch.randint(3, VOCABULARY, (batch, 20), generator=torch.Generator().manual_seed(1))


def opened(folder, **options):
    model, _ = load(folder, **options)
    return model


def generate(model, batch, **options):
    mask = PADDED[:batch] if batch > 1 else None
    return model.generate(prompt(batch), attention_mask=mask, max_new_tokens=10, do_sample=False, **options)


@every_model
@pytest.mark.parametrize("pool", ["25%", "50%", "100%"])
def test_exact_routing_gives_the_models_own_output(checkpoints, name, pool):
    own = load_model(checkpoints(name))
    slots = max(3, round(int(pool[:-1]) / 100 * 8))
    model = opened(checkpoints(name), pool=slots)
    with torch.inference_mode():
        expected, logits = own(prompt(1)).logits, model(prompt(1)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(generate(model, 1), generate(own, 1))
    assert torch.equal(generate(model, 4), generate(own, 4))
    counters = model.cachemoe.counters
    assert counters.selections == sum(layer.selections for layer in model.cachemoe.layers)
    assert 0 < counters.misses == sum(layer.misses for layer in model.cachemoe.layers) <= counters.pages_read
    model.cachemoe.close()


@every_model
def test_a_static_cache_gives_the_models_own_tokens(checkpoints, name):
    if name == "lfm2_moe":
        pytest.skip("its convolutions' cache is its own")
    own, model = load_model(checkpoints(name)), opened(checkpoints(name), pool=4)
    expected = generate(own, 4, cache_implementation="static")
    assert torch.equal(generate(model, 4, cache_implementation="static"), expected)
    model.cachemoe.close()


@every_model
def test_prefill_then_decode_gives_the_whole_sequences_logits(checkpoints, name):
    own, model = load_model(checkpoints(name)), opened(checkpoints(name), pool=4)
    with torch.inference_mode():
        expected = own(prompt(1)).logits
        output = model(prompt(1)[:, :15], use_cache=True)
        logits = [output.logits]
        for token in prompt(1)[0, 15:]:
            output = model(token[None, None], past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-4)
    model.cachemoe.close()


@every_model
def test_a_rule_found_routes_as_the_model_does(checkpoints, name):
    """With a bias that is next to none, the routing is cachemoe's own and the outcome the model's."""
    own, model = load_model(checkpoints(name)), opened(checkpoints(name), pool=4, routing=CachePrior(1e-12))
    with torch.inference_mode():
        expected, logits = own(prompt(1)).logits, model(prompt(1)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(generate(model, 4), generate(own, 4))
    model.cachemoe.close()


@every_model
@pytest.mark.parametrize("routing", [CachePrior(1.0, top_j=1), MaxRank(6, top_j=1), CumSum(0.9, top_j=1)])
def test_a_biased_routing_misses_less(checkpoints, name, routing):
    model = opened(checkpoints(name), pool=4)
    generate(model, 1)
    exact = model.cachemoe.counters.misses
    model.cachemoe.routing = routing
    model.cachemoe.reset_counters()
    generate(model, 1)
    assert model.cachemoe.counters.misses < exact
    model.cachemoe.close()


@every_model
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rounded_pages_give_what_the_rounded_model_gives(checkpoints, name, kind):
    folder = checkpoints(name)
    checkpoint, own = Checkpoint(folder), load_model(folder)
    layout = checkpoint.layout(kind)
    round_experts(own, checkpoint, layout.page_format)
    model = opened(folder, pool=4, format=kind)
    with torch.inference_mode():
        expected, logits = own(prompt(1)).logits, model(prompt(1)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    model.cachemoe.close()


def round_experts(model, checkpoint, page_format):
    """Give a model the weights that its pages hold."""
    from cachemoe.moe.swap import moe_layers

    for number, layer in enumerate(moe_layers(model)):
        for e in range(layer.count):
            views = page_format.views(page_format.pack(**checkpoint.expert(number, e)))
            for name in ("gate_up", "down"):
                weight = page_format.dequantized(views, name)
                parameter = getattr(layer.experts, f"{name}_proj").data
                parameter[e] = weight.T if layer.experts.is_transposed else weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_are_loaded_as_they_are(tmp_path, dtype):
    save_random("qwen3_moe", tmp_path / "half", dtype)
    model = opened(tmp_path / "half", pool=4)
    assert model.dtype == dtype
    assert model.cachemoe.engine.page_format.kind == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    own = load_model(tmp_path / "half", dtype)
    with torch.inference_mode():
        expected, logits = own(prompt(1)).logits.float(), model(prompt(1)).logits.float()
    torch.testing.assert_close(logits, expected, rtol=0.1, atol=0.1)
    model.cachemoe.close()


@every_model
@pytest.mark.parametrize("pool", [None, 4])
def test_swap_gives_the_models_own_output(checkpoints, name, pool, cache):
    own, model = load_model(checkpoints(name)), load_model(checkpoints(name))
    pooled = swap(model, pool=pool)
    assert all(parameter.is_meta for layer in moe_layers(model) for parameter in layer.experts.parameters())
    assert not list(cache.glob("*.safetensors"))  # the pages' file is held open, and has no name any more
    with torch.inference_mode():
        expected, logits = own(prompt(1)).logits, model(prompt(1)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(generate(model, 4), generate(own, 4))
    assert (pooled.counters.misses == 0) == (pool is None)
    assert pooled is model.cachemoe
    pooled.close()
