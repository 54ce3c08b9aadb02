"""Dense weights rounded, and a token through an attention in one call: held to the model with the same numbers."""

import copy

import pytest
import torch
from tiny_models import MODELS, VOCABULARY

from cachemoe.kernels import attention_cpu, quantized_cpu
from cachemoe.moe import decode_step
from cachemoe.moe.dense import RoundedLinear
from cachemoe.moe.load import load
from cachemoe.moe.models import load_model
from cachemoe.offload.errors import InputError

# Whose attention is of another kind: latent, with sinks, turned in pairs, normalised after it is turned or behind.
OTHERS = "deepseek_v2", "deepseek_v2 in groups", "deepseek_v3", "phimoe", "gpt_oss", "ernie4_5_moe", "hunyuan_v1_moe"
STEPS = dict.fromkeys(MODELS, 3) | dict.fromkeys((*OTHERS, "lfm2_moe", "flex_olmo"), 0)  # of three layers
TOKENS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pair(folders, tmp_path, monkeypatch, quiet):
    """(name, kind) -> the model with rounded weights, and transformers' own with the same numbers."""
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decode_step, "GROWTH", 3)  # so that room runs out
    models = []

    def pair(name, kind, dtype=torch.float32):
        model, _ = load(folders(name, dtype), pool=4, device="cpu", dense=kind, progress=quiet)
        models.append(model)
        own = load_model(folders(name, dtype), dtype)
        for path, module in model.named_modules():
            if isinstance(module, RoundedLinear):
                own.get_submodule(path).weight = torch.nn.Parameter(module.rounded.numbers(dtype))
        return model, own

    yield pair
    for model in models:
        model.cachemoe.close()


def steps_of(model):
    """How many layers take a token in one call."""
    forwards = (getattr(vars(module).get("forward"), "__func__", None) for module in model.modules())
    return sum(getattr(forward, "func", None) is decode_step._forward for forward in forwards)


def run(model, tokens, cuts, cache=None):
    """Logits of a sequence taken in pieces."""
    logits, first = [], 0
    for end in cuts:
        output = model(tokens[:, first:end], past_key_values=cache, use_cache=True)
        cache, first = output.past_key_values, end
        logits.append(output.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["int8", "int4"])
@torch.inference_mode()
def test_a_model_with_rounded_weights_computes_with_these_numbers(pair, name, kind):
    model, own = pair(name, kind)
    assert steps_of(model) == STEPS[name]
    cuts = [9, *range(10, 18), 21, 22, 23, 24]  # a prompt, tokens, another prompt, and tokens again
    logits, _ = run(model, TOKENS[:1], cuts)
    torch.testing.assert_close(logits, own(TOKENS[:1]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_moe", "glm4_moe"])  # with biases; turned in part
@torch.inference_mode()
def test_in_bfloat16_it_rounds_as_the_model_does(pair, name):
    model, own = pair(name, "int8", torch.bfloat16)
    assert steps_of(model) == 3
    logits, _ = run(model, TOKENS[:1], range(1, 25))
    expected = own(TOKENS[:1]).logits
    errors = (logits - expected).float().abs().amax(-1) / expected.abs().max()
    assert (errors < 0.03).float().mean() > 0.8  # one whose router was undecided may have gone another way


def test_generate_takes_the_steps_and_other_ways_of_decoding_do_as_the_model(pair):
    model, own = pair("qwen3_moe", "int8")
    taken = []
    layer = model.model.layers[1]
    step, feed = layer.forward, layer.mlp.forward
    layer.mlp.forward = lambda hidden: (taken.append(hidden.shape), feed(hidden))[1]
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[0, :5] = 0
    one = {"input_ids": TOKENS[:1], "max_new_tokens": 12}
    ways = (
        one,
        {"input_ids": TOKENS, "attention_mask": mask, "max_new_tokens": 6},
        one | {"num_beams": 3},
        one | {"cache_implementation": "static"},
        one | {"prompt_lookup_num_tokens": 3},  # crops the cache
        one | {"use_cache": False},
    )
    for options in ways:
        given, expected = (each.generate(do_sample=False, **options) for each in (model, own))
        assert torch.equal(given, expected), options
    assert layer.forward is step and (1, 1, 32) in taken


@torch.inference_mode()
def test_two_sequences_go_on_from_one_prompt(pair):
    """A copy of a cache has the same room: neither may write over the other's tokens."""
    model, own = pair("olmoe", "int8")
    _, cache = run(model, TOKENS[:1], [8, 9, 10])
    _, expected = run(own, TOKENS[:1], [8, 9, 10])
    shallow = copy.copy(cache)
    shallow.layers = [copy.copy(layer) for layer in cache.layers]
    caches = cache, shallow, copy.deepcopy(cache)
    likes = [copy.deepcopy(expected) for _ in caches]
    for t in range(10, 16):
        for i, (each, like) in enumerate(zip(caches, likes, strict=True)):
            token = (TOKENS[:1, t : t + 1] + i) % VOCABULARY
            given, other = (m(token, past_key_values=c, use_cache=True).logits for m, c in ((model, each), (own, like)))
            torch.testing.assert_close(given, other, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_what_is_changed_in_a_layer_counts(pair):
    model, own = pair("qwen3_moe", "int8")
    seen = []

    def changed(change):
        for each in (model, own):
            change(each.model.layers[1])
        given, _ = run(model, TOKENS[:1], [8, *range(9, 13)])
        torch.testing.assert_close(given, own(TOKENS[:1, :12]).logits, rtol=1e-4, atol=1e-4)

    changed(lambda layer: layer.input_layernorm.weight.mul_(1.5))
    changed(lambda layer: setattr(layer.self_attn.q_norm, "weight", torch.nn.Parameter(torch.full((8,), 0.7))))
    changed(lambda layer: layer.self_attn.register_forward_hook(lambda *_: seen.append(1)))
    assert len(seen) == 5 + 1
    output = model(TOKENS[:1, :4], output_attentions=True, output_hidden_states=True)
    assert len(output.hidden_states) == 4


def test_gradients_are_refused_in_a_sentence(pair):
    model, _ = pair("qwen3_moe", "int4")
    embedded = model.get_input_embeddings()(TOKENS[:1]).detach().requires_grad_()
    with pytest.raises(InputError, match="give no gradients"):
        model(inputs_embeds=embedded).logits.sum().backward()


def test_the_label_the_print_and_the_errors_say_that_weights_are_rounded(pair):
    model, _ = pair("mixtral", "int4")
    pooled = model.cachemoe
    assert pooled.label == "precision changed"
    assert set(pooled.dense.errors) == {"layer 0", "layer 1", "layer 2", "lm_head"}
    assert all(0.05 < error < 0.15 for error in pooled.dense.errors.values())
    assert pooled.dense.bytes_after < pooled.dense.bytes_before / 5
    assert "of int4 in place of" in str(pooled) and "rounding error" in str(pooled)
    attentions = [layer.self_attn for layer in model.model.layers]
    assert not any(type(module) is torch.nn.Linear for each in attentions for module in each.children())


def test_without_a_compiler_it_is_slow_and_right(pair, monkeypatch):
    for library in (quantized_cpu, attention_cpu):
        monkeypatch.setattr(library, "has_c", lambda: False)
    model, own = pair("qwen2_moe", "int4")
    assert steps_of(model) == 0
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS[:1]).logits, own(TOKENS[:1]).logits, rtol=1e-4, atol=1e-4)


def test_another_kind_is_refused(folders, quiet):
    with pytest.raises(InputError, match="dense is int8 or int4, or left out, not 'int2'"):
        load(folders("mixtral"), dense="int2", device="cpu", progress=quiet)
