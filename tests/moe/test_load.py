"""load and what it gives: any architecture, the model's own output from a pool, and what is refused."""

import dataclasses
import gc
import shutil
import threading
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MODELS, VOCABULARY, save_mxfp4, save_random

from cachemoe.moe.checkpoint import COARSEMOE, TINYMOE, Checkpoint
from cachemoe.moe.layers import moe_layers
from cachemoe.moe.load import load, swap
from cachemoe.moe.models import load_model, load_without_experts
from cachemoe.moe.pack import pack
from cachemoe.moe.shape import MoeShape
from cachemoe.moe.shards import Shards
from cachemoe.moe.sizes import slots_of
from cachemoe.moe.strategies import CachePrior, CumSum, MaxRank, Original
from cachemoe.offload.errors import InputError
from cachemoe.offload.pool import ExpertPool

transformers = pytest.importorskip("transformers")
every_model = pytest.mark.parametrize("name", MODELS)
# What a GPU may stumble over, all in one: biases, interleaved matrices, attention in windows.
IMITATED = ("gpt_oss",)
INTERPRETED = pytest.mark.gpu_only("the interpreter takes seconds for a model")
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


@contextmanager
def quiet(description, total):
    yield lambda: None


def prompt(batch):
    return torch.randint(3, VOCABULARY, (batch, 20), generator=torch.Generator().manual_seed(1))


def opened(folder, device="cpu", **options):
    model, _ = load(folder, device=device, **options)
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
    assert counters.misses == sum(layer.misses for layer in model.cachemoe.layers) <= counters.pages_read
    assert (counters.misses == 0) == (slots == 8)  # a pool for all has all from the start
    model.cachemoe.close()


@pytest.mark.gpu
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in IMITATED else INTERPRETED) for name in MODELS])
@pytest.mark.parametrize("routing", [pytest.param(None, marks=INTERPRETED), CachePrior(1e-12)])
def test_a_gpu_gives_the_models_own_output(checkpoints, name, routing):
    own, model = load_model(checkpoints(name)).cuda(), opened(checkpoints(name), "cuda", pool=4, routing=routing)
    tokens = prompt(2).cuda()
    with torch.inference_mode():
        expected, logits = own(tokens).logits, model(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert model.cachemoe.counters.misses > 0
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
@pytest.mark.parametrize("kind", ["int8", "int4", "int2"])
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
    for number, layer in enumerate(moe_layers(model)):
        for e in range(layer.count):
            views = page_format.views(page_format.pack(**checkpoint.expert(number, e)))
            for name in ("gate_up", "down"):
                weight = page_format.dequantized(views, name)
                parameter = getattr(layer.experts, f"{name}_proj").data
                parameter[e] = weight.T if layer.experts.is_transposed else weight


def test_an_mxfp4_checkpoint_gives_what_its_values_give(checkpoints, tmp_path):
    expected = save_mxfp4(checkpoints("gpt_oss"), tmp_path / "mxfp4")
    own, model = load_model(checkpoints("gpt_oss")), opened(tmp_path / "mxfp4", pool=4)
    for name, values in expected.items():
        own.get_parameter(name).data.copy_(values.mT)
    with torch.inference_mode():
        torch.testing.assert_close(model(prompt(1)).logits, own(prompt(1)).logits, rtol=1e-4, atol=1e-4)
    assert model.cachemoe.label == "exact"
    model.cachemoe.close()


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


def test_another_routing_and_another_pool_between_two_tokens(checkpoints):
    model = opened(checkpoints("qwen3_moe"), pool="50%")
    expected = generate(model, 1)
    model.cachemoe.resize("100%")
    assert [layer.slots for layer in model.cachemoe.layers] == [8, 8, 8]
    model.cachemoe.routing = CachePrior(1.0, top_j=0)
    generate(model, 1)
    assert "cache-prior:1; routing changed" in str(model.cachemoe)
    model.cachemoe.resize("25%")
    model.cachemoe.routing = Original()
    assert torch.equal(generate(model, 1), expected)
    model.cachemoe.close()


def test_after_close_nothing_of_cachemoe_is_left(checkpoints):
    model = opened(checkpoints("mixtral"), pool=4, routing=CachePrior(0.5))
    model.cachemoe.close()
    model.cachemoe.close()
    assert not any("forward" in vars(layer.router) for layer in moe_layers(model))
    with pytest.raises(RuntimeError, match="experts are closed: load it again"):
        model(prompt(1))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read ")]


def test_a_model_that_is_gone_leaves_no_thread(checkpoints):
    model = opened(checkpoints("mixtral"), pool=4, routing=CachePrior(0.5))
    generate(model, 1)
    del model
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read ")]


def test_experts_called_with_other_ids_compute_those(checkpoints):
    """As where something else routes, or another thread has routed meanwhile."""
    own, model = load_model(checkpoints("mixtral")), opened(checkpoints("mixtral"), pool=4, routing=CachePrior(0.5))
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(20)])
    x, weights = torch.randn(20, 32, generator=generator), torch.rand(20, 2, generator=generator)
    with torch.inference_mode():
        model(prompt(1))
        for ours, theirs in zip(moe_layers(model), moe_layers(own), strict=True):
            torch.testing.assert_close(ours.experts(x, ids, weights), theirs.experts(x, ids, weights))
    model.cachemoe.close()


def test_swap_of_a_model_as_users_load_it(checkpoints):
    """With gradients on, as transformers leaves them; and what fails leaves the model as it was."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints("mixtral"))
    expected = model(prompt(1)).logits
    with pytest.raises(InputError, match="must lie between"):
        swap(model, pool="1%")
    for layer in moe_layers(model):
        layer.router.forward = lambda hidden: (torch.zeros(len(hidden), 8),) * 2
    with pytest.raises(InputError, match="do not answer with logits"):
        swap(model, routing=CachePrior(0.5), pool=4)
    for layer in moe_layers(model):
        del layer.router.forward
    assert torch.equal(model(prompt(1)).logits, expected)
    swap(model, pool=4)
    torch.testing.assert_close(model(prompt(1)).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="swapped already"):
        swap(model)
    model.cachemoe.close()


def test_a_resize_that_fails_leaves_routing_and_engine_of_one_mind(checkpoints, monkeypatch):
    model = opened(checkpoints("qwen3_moe"), pool=6)
    expected = generate(model, 1)
    own = ExpertPool.resize

    def fails(pool, frames):
        raise InputError("no memory")

    for pool in (2, 8):
        monkeypatch.setattr(ExpertPool, "resize", fails)
        with pytest.raises(InputError, match="no memory"):
            model.cachemoe.resize(pool)
        monkeypatch.setattr(ExpertPool, "resize", own)
        assert torch.equal(generate(model, 1), expected)
    model.cachemoe.close()


def test_a_format_that_is_not_the_stores_is_refused(checkpoints, tmp_path):
    checkpoint, store = Checkpoint(checkpoints("qwen3_moe")), tmp_path / "store.safetensors"
    pack(checkpoint, checkpoint.layout("int4"), store, quiet)
    refused("holds int4 pages, and format says bf16", checkpoint.path, store=store, format="bf16")


def test_an_activation_that_is_not_the_configs_is_refused(checkpoints):
    model = load_model(checkpoints("mixtral"))
    others = [torch.nn.Tanh(), torch.nn.GELU(), lambda gate: torch.nn.functional.silu(gate.clamp(max=50.0))]
    for other in others:
        for layer in moe_layers(model):
            del layer.experts.act_fn
            layer.experts.act_fn = other
        with pytest.raises(InputError, match="activation that cachemoe does not compute"):
            swap(model)


def test_the_store_is_made_once(checkpoints, cache):
    opened(checkpoints("olmoe"), pool=4).cachemoe.close()
    (store,) = cache.glob("*.safetensors")
    made = store.stat().st_mtime_ns
    opened(checkpoints("olmoe"), pool=4).cachemoe.close()
    assert store.stat().st_mtime_ns == made


@pytest.mark.parametrize("way", ["load", "swap"])
def test_what_a_killed_packing_left_is_removed(checkpoints, cache, way):
    for name in ("another-int8.safetensors.partial", "swapped-0123.safetensors.partial"):
        cache.mkdir(exist_ok=True)
        (cache / name).write_bytes(b"half of a store")
    if way == "load":
        opened(checkpoints("mixtral")).cachemoe.close()
        assert len(list(cache.glob("*.safetensors"))) == 1
    else:
        swap(load_model(checkpoints("mixtral")), pool=4, progress=quiet).close()
        assert not list(cache.glob("*.safetensors"))
    assert not list(cache.glob("*.partial"))


def test_a_folder_of_a_name_as_long_as_can_be(checkpoints, tmp_path, cache):
    folder = shutil.copytree(checkpoints("mixtral"), tmp_path / ("é" * 127))
    opened(folder).cachemoe.close()
    assert len(list(cache.glob("éé*.safetensors"))) == 1


def test_an_adapter_beside_the_weights_is_refused(checkpoints, tmp_path):
    """transformers would put it onto them."""
    folder = shutil.copytree(checkpoints("mixtral"), tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="has an adapter beside its weights"):
        load(folder, progress=quiet)


def test_a_strategy_without_a_j_changes_what_a_model_of_two_experts_a_token_does(cache):
    model, tokenizer = load(COARSEMOE, pool="50%", routing="cache-prior:1", device="cpu")
    own, _ = load(COARSEMOE, pool="50%", device="cpu")
    inputs = tokenizer("The assignment statement is an", return_tensors="pt")
    assert not torch.equal(model(**inputs).logits, own(**inputs).logits)
    model.cachemoe.close()
    own.cachemoe.close()


@pytest.mark.parametrize("slots", [3, 8])
@pytest.mark.parametrize("format", ["int4", "int8", "int2"])
def test_a_token_of_hits_in_one_call_gives_the_same_bits_and_leaves_the_same_state(
    checkpoints, slots, format, monkeypatch
):
    results = []
    for allowed in (True, False):
        model = opened(checkpoints("deepseek_v3"), pool=slots, format=format)
        hit, taken = model.cachemoe.engine.hit, []
        monkeypatch.setattr(model.cachemoe.engine, "hit", lambda *a, h=hit, t=taken: t.append(h(*a)) or t[-1])
        if not allowed:
            monkeypatch.setattr(model.cachemoe.engine, "hit", lambda *_: None)
        with torch.inference_mode():
            cache, logits = None, []
            for part in prompt(1).split([4, *[1] * 16], 1):
                output = model(part, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits.append(output.logits)
        counters = dataclasses.asdict(model.cachemoe.counters)
        whole = {name: value for name, value in counters.items() if not name.endswith("_s")}
        results.append((torch.cat(logits, 1), whole, model.cachemoe.layers, model.cachemoe.engine.state.tensors()))
        assert any(y is not None for y in taken) == allowed
        model.cachemoe.close()
    (logits, counters, layers, state), (others, *expected, like) = results
    assert torch.equal(logits, others) and [counters, layers] == expected
    for name, tensor in state.items():
        assert torch.equal(tensor, like[name]), name


def test_hidden_states_may_be_strided(checkpoints):
    model = opened(checkpoints("qwen3_moe"), pool="100%", format="int4")
    experts, x = moe_layers(model)[0].experts, torch.randn(1, 64)[:, ::2]
    chosen = torch.tensor([[2, 5]]), torch.tensor([[0.7, 0.3]])
    assert torch.equal(experts(x, *chosen), experts(x.contiguous(), *chosen))
    model.cachemoe.close()


def test_ids_that_no_expert_has_are_refused_whatever_is_resident(checkpoints):
    model = opened(checkpoints("qwen3_moe"), pool="100%", format="int4")
    experts, x = moe_layers(model)[0].experts, torch.randn(1, 32)
    for ids in ([0, 8], [-1, 0]):
        with pytest.raises(InputError, match=f"{min(ids)} to {max(ids)}: it has 8"):
            experts(x, torch.tensor([ids]), torch.tensor([[0.5, 0.5]]))
    model.cachemoe.close()


def test_tinymoe_and_its_tokenizer(cache):
    text = "The assignment statement é\n"
    model, tokenizer = load(TINYMOE, pool="50%", routing="cache-prior:0.5", device="cpu")
    inputs = tokenizer(text, return_tensors="pt")
    assert inputs.input_ids[0].tolist() == list(text.encode())
    assert tokenizer.decode(inputs.input_ids[0]) == text
    model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert model.cachemoe.counters.misses > 0
    model.cachemoe.close()


SHAPE = MoeShape(layers=(0, 1, 2), experts=8, top_k=2, hidden=1, intermediate=1, vocabulary=1, context=1)


@pytest.mark.parametrize(
    ("pool", "slots"),
    [
        ("50%", [4, 4, 4]),
        ("100%", [8, 8, 8]),
        ("12.5 %", None),
        (3, [3, 3, 3]),
        ("3", [3, 3, 3]),
        ("8000B", [3, 3, 2]),
        ("10 kB", [4, 3, 3]),
        ("1GiB", [8, 8, 8]),
        ("5kb", None),
        (9, None),
        ("120%", None),
    ],
)
def test_a_pool_is_a_share_or_a_size_or_slots(pool, slots):
    if slots is None:
        with pytest.raises(InputError, match="must lie between the 2 that a token uses"):
            slots_of(pool, SHAPE, 1000)
    else:
        assert slots_of(pool, SHAPE, 1000) == slots


@pytest.mark.parametrize(("top_k", "slots"), [(2, 4), (4, 4), (6, 6), (8, 8)])
def test_a_pool_that_nobody_chose_is_half_or_what_a_token_uses(top_k, slots):
    shape = dataclasses.replace(SHAPE, top_k=top_k)
    assert slots_of(None, shape, 1000) == [slots] * 3
    if top_k > 4:
        with pytest.raises(InputError, match=f"must lie between the {top_k}"):
            slots_of("50%", shape, 1000)


@pytest.mark.parametrize("pool", ["half", "6 Gi", "-1", "1.5", "", "9" * 5000, "9" * 400 + "%", "9" * 400 + "GB"])
def test_any_other_pool_is_refused(pool):
    with pytest.raises(InputError, match="is no size such as 6GiB"):
        slots_of(pool, SHAPE, 1000)


def refused(words, path, **options):
    with pytest.raises(InputError, match=words):
        load(path, **options)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read ")]


def test_bad_input_is_refused_in_a_sentence(checkpoints, tmp_path, monkeypatch):
    folder = checkpoints("qwen3_moe")
    refused("must lie between the 2", folder, pool="10%")
    refused("unknown eviction policy 'fifo'", folder, eviction="fifo")
    refused("unknown page format 'int3'", folder, format="int3")
    refused("lambda of cache-prior must lie between", folder, routing=CachePrior(2.0))
    refused("unknown strategy", folder, routing="best")
    refused("there is no store at", folder, store=tmp_path / "absent.safetensors")
    refused("no checkpoint folder", tmp_path / "absent")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("there is no folder nobody/nothing, and the Hugging Face hub does not give", "nobody/nothing")


def test_a_store_of_another_checkpoint_is_refused(checkpoints, tmp_path):
    other = Checkpoint(checkpoints("olmoe"))
    pack(other, other.layout(), tmp_path / "store.safetensors", quiet)
    refused("holds pages of another checkpoint", checkpoints("qwen3_moe"), store=tmp_path / "store.safetensors")


def test_a_checkpoint_that_lacks_a_dense_tensor_is_refused(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints("qwen3_moe"), tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(r"lacks 1 of the model's tensors, model\.layers\.1\.self_attn\.o_proj", folder)


def test_a_dense_model_is_refused_by_swap():
    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(InputError, match="no experts that go through"):
        swap(transformers.LlamaForCausalLM(config))


def test_no_expert_is_read_whole_or_twice(checkpoints, monkeypatch):
    """Loading reads what is not an expert's, and of experts what tells models apart: a row of each matrix."""
    read = []
    own = Shards.read
    monkeypatch.setattr(
        Shards, "read", lambda self, name, *index: (read.append((name, index)), own(self, name, *index))[1]
    )
    checkpoint = Checkpoint(checkpoints("qwen3_moe"))
    load_without_experts(checkpoint)
    names = [name for name, _ in read]
    assert sorted(names) == sorted(name for name in checkpoint.tensors.entries if ".experts." not in name)


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "exact"),
        ({"routing": CachePrior(0.5)}, "routing changed"),
        ({"format": "bf16"}, "precision changed"),
        ({"format": "int4", "routing": CachePrior(0.5)}, "routing changed, precision changed"),
    ],
)
def test_what_differs_from_the_model_is_said(checkpoints, options, label):
    model = opened(checkpoints("qwen3_moe"), pool=4, **options)
    assert model.cachemoe.label == label
    assert label in str(model.cachemoe)
    model.cachemoe.close()
