"""A model whose experts are in a pool: each way in and out of its parameters works, or ends in one sentence."""

import copy
import os
import pickle
import threading

import pytest
import torch
from tiny_models import save_random

from cachemoe import CachePrior, InputError, load, swap
from cachemoe.moe.in_memory import ModelExperts
from cachemoe.moe.layers import moe_layers
from cachemoe.moe.models import load_model

PROMPTS = [torch.randint(3, 96, (1, 1 + i), generator=torch.Generator().manual_seed(i)) for i in range(6)]
PROMPT = torch.randint(3, 96, (1, 20), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    save_random("qwen3_moe", tmp_path_factory.mktemp("doors") / "model")
    return tmp_path_factory.getbasetemp() / "doors0" / "model"


@pytest.fixture(scope="module")
def own(folder):
    return load_model(folder)


@pytest.fixture
def pooled(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))
    model, _ = load(folder, pool=4, device="cpu")
    yield model
    model.cachemoe.close()


def same(model, own):
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, own(PROMPT).logits, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- parameters


def test_shapes_and_dtypes_can_be_asked(pooled, own):
    for (name, ours), (_, theirs) in zip(pooled.named_parameters(), own.named_parameters(), strict=True):
        assert (ours.shape, ours.dtype, ours.numel()) == (theirs.shape, theirs.dtype, theirs.numel()), name
    assert pooled.num_parameters() == own.num_parameters()
    assert pooled.get_memory_footprint() == own.get_memory_footprint()
    assert "PooledParameter" in repr(moe_layers(pooled)[0].experts.down_proj)
    pooled.requires_grad_(False)
    for parameter in pooled.parameters():  # as adapters of other layers begin
        parameter.requires_grad = False
    pooled.zero_grad()


@pytest.mark.parametrize(
    "use",
    [
        lambda p: p.data.add_(0.1),
        lambda p: p.add_(0.1),
        lambda p: p.copy_(torch.zeros(p.shape)),
        lambda p: p + 1,
        lambda p: p.detach(),
        lambda p: p[0],
        lambda p: p.cpu(),
        lambda p: p.to(torch.float16),
        lambda p: torch.nn.functional.linear(torch.zeros(2, p.shape[-1]), p[0]),
        lambda p: torch.nn.init.normal_(p),
        lambda p: setattr(p, "data", torch.zeros(p.shape)),
        lambda p: p.requires_grad_(),
        lambda p: setattr(p, "requires_grad", True),
    ],
)
def test_values_can_neither_be_read_nor_written(pooled, use):
    with pytest.raises(InputError, match="can neither be read nor written"):
        use(moe_layers(pooled)[1].experts.down_proj)


def test_a_state_dict_is_refused_both_ways(pooled, own):
    dense = pooled.model.embed_tokens.weight.clone()
    with pytest.raises(InputError, match="can neither be read nor written"):
        pooled.state_dict()
    weights = {name: weight + 1 for name, weight in own.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(InputError, match="cannot be loaded into them"):
            pooled.load_state_dict(weights, strict=strict)
    assert torch.equal(pooled.model.embed_tokens.weight, dense)
    pooled.load_state_dict({name: w for name, w in own.state_dict().items() if ".experts." not in name}, strict=False)
    same(pooled, own)


def test_parameters_cannot_be_replaced(pooled, own):
    with pytest.raises(InputError, match="down_proj cannot be replaced"):
        moe_layers(pooled)[0].experts.down_proj = torch.nn.Parameter(torch.zeros(8, 32, 32))
    for part, theirs in ((pooled, own), (pooled.model, own.model)):
        weights = {name: weight + 1 for name, weight in theirs.state_dict().items() if ".experts." in name}
        for assign in (False, True):
            with pytest.raises(InputError, match="cannot be loaded into them"):
                part.load_state_dict(weights, strict=False, assign=assign)
    same(pooled, own)


def test_saving_is_refused_before_anything_is_written(pooled, tmp_path):
    with pytest.raises(InputError, match="cannot be saved"):
        pooled.save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match="cannot be saved"):
        pooled.model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("part", [lambda m: m, lambda m: m.model, lambda m: m.cachemoe, lambda m: m.model.layers[0]])
@pytest.mark.parametrize("routing", [None, CachePrior(0.5)])
def test_copies_are_refused(pooled, copied, part, routing):
    pooled.cachemoe.routing = routing
    with pytest.raises(InputError, match="cannot be copied or pickled"):
        copied(part(pooled))


def test_where_it_is_a_model_may_be_moved_and_converted(pooled, own):
    assert pooled.to("cpu") is pooled
    same(pooled.cpu().float(), own)
    with pytest.raises(InputError, match="on cpu cannot move to meta: load it there"):
        pooled.to("meta")
    with pytest.raises(InputError, match="on cpu cannot move to meta: load it there"):
        pooled.model.layers.to("meta")
    same(pooled, own)
    with torch.no_grad():
        assert pooled.to(torch.bfloat16)(PROMPT).logits.isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_other_experts_implementations_change_nothing(pooled, own, implementation):
    pooled.set_experts_implementation(implementation)
    same(pooled, own)


def test_a_backward_pass_raises_and_a_forward_pass_does_not(pooled):
    x = torch.randn(1, 5, pooled.config.hidden_size, requires_grad=True)
    loss = pooled(inputs_embeds=x).logits.sum()
    with pytest.raises(InputError, match="give no gradients"):
        loss.backward()
    for layer in moe_layers(pooled):  # the router alone is trained
        layer.router.requires_grad_()
    with pytest.raises(InputError, match="give no gradients"):
        pooled(PROMPT).logits.sum().backward()


# -------------------------------------------------------------------------------------------------------- what swap
# takes


def test_a_model_of_which_a_layer_is_elsewhere_is_refused(folder):
    model = load_model(folder)
    experts = moe_layers(model)[1].experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to("meta"), requires_grad=False)
    with pytest.raises(InputError, match="MoE layer 1 have no weights in memory"):
        swap(model, pool=4)


class Adapter(torch.nn.Module):
    """As PEFT wraps experts to add a low-rank matrix to their parameters."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, *arguments):
        return self.base_layer(*arguments)


def test_adapted_experts_are_refused_and_not_left_out(folder):
    model = load_model(folder)
    block = moe_layers(model)[1].block
    block.experts = Adapter(block.experts)
    with pytest.raises(InputError, match=r"Adapter adapts the experts' weights.*merge the adapter first"):
        ModelExperts(model)
    block.experts = block.experts.base_layer
    torch.nn.utils.parametrize.register_parametrization(block.experts, "down_proj", torch.nn.Identity())
    with pytest.raises(InputError, match="merge the adapter first"):
        ModelExperts(model)


# ------------------------------------------------------------------------------------------------------------ threads


def together(*jobs):
    errors = []

    def run(job):
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not errors, errors


def ask(model, prompt):
    return model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)


def test_threads_that_generate_get_what_they_would_get_alone(pooled, own):
    expected, got = [ask(own, prompt) for prompt in PROMPTS], {}
    together(*(lambda i=i: got.update({i: ask(pooled, PROMPTS[i])}) for i in range(6)))
    for i, text in enumerate(expected):
        assert torch.equal(got[i], text)
        assert torch.equal(ask(pooled, PROMPTS[i]), text)


def test_threads_and_changes_between_them(pooled, own):
    """Resizing and routing by turns while others generate: with lambda = 1e-12 no routing differs from the model's."""
    expected, got = [ask(own, prompt) for prompt in PROMPTS], {}

    def change():
        for i in range(12):
            pooled.cachemoe.resize(3 + i % 3)
            pooled.cachemoe.routing = (None, "cache-prior:1e-12", CachePrior(1e-12))[i % 3]

    together(change, *(lambda i=i: got.update({i: ask(pooled, PROMPTS[i])}) for i in range(4)))
    for i in range(4):
        assert torch.equal(got[i], expected[i])


def test_closing_while_a_thread_generates_ends_it_in_a_sentence(pooled):
    begun, raised = threading.Event(), []

    def generate():
        try:
            while True:
                ask(pooled, PROMPTS[3])
                begun.set()
        except RuntimeError as error:
            raised.append(str(error))

    together(generate, lambda: begun.wait(60) and pooled.cachemoe.close())
    assert raised == ["the model's experts are closed: load it again"]


def test_after_closing_nothing_can_be_changed(pooled):
    pooled.cachemoe.routing = CachePrior(0.5)
    pooled.cachemoe.close()
    for change in (lambda: setattr(pooled.cachemoe, "routing", None), lambda: pooled.cachemoe.resize(3)):
        with pytest.raises(RuntimeError, match="closed: load it again"):
            change()
    assert moe_layers(pooled)[0].router(torch.zeros(1, 32))[0].shape == (1, 8)


def test_a_forked_process_is_told_and_does_not_hang(pooled):
    read, write = os.pipe()
    with pooled.cachemoe._lock, pooled.cachemoe.engine._link._lock:  # as other threads may hold them at that moment
        if (child := os.fork()) == 0:
            torch.set_num_threads(1)
            try:
                pooled(PROMPT)
            except BaseException as error:
                os.write(write, repr(error).encode())
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        assert "forked off after its model" in pipe.read()


# ------------------------------------------------------------------------------------------- what torch is set to


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype(folder, tmp_path, monkeypatch, own, dtype):
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))
    try:
        torch.set_default_dtype(dtype)
        model, _ = load(folder, pool=4, device="cpu", routing=CachePrior(1e-12))
        same(model, own)
        for token in PROMPT[0, :4]:
            model(token[None, None])
    finally:
        torch.set_default_dtype(torch.float32)
    model.cachemoe.close()


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")])
@pytest.mark.parametrize("format", [None, "int8"])
def test_loaded_within_a_context_it_runs_outside_and_inside(folder, tmp_path, monkeypatch, own, around, format):
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))
    with around():
        model, _ = load(folder, pool=4, device="cpu", routing=CachePrior(1e-12), format=format)
        model.cachemoe.resize(6)
    if format is None:
        same(model, own)
    with torch.no_grad():
        expected = model(PROMPT).logits
        if around is torch.inference_mode or around is torch.no_grad:
            with around():
                torch.testing.assert_close(model(PROMPT).logits, expected)
    model.cachemoe.close()


def test_a_routers_rule_is_found_under_autocast(folder, tmp_path, monkeypatch, own):
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))
    with torch.autocast("cpu", torch.bfloat16):
        model, _ = load(folder, pool=4, device="cpu", routing=CachePrior(1e-12))
        assert model(PROMPT).logits.isfinite().all()
    same(model, own)
    model.cachemoe.close()
