"""What is changed in a loaded model, or between its routers and experts: it counts, or is refused in a sentence."""

import os
import random
import signal
from contextlib import contextmanager

import pytest
import torch
from tiny_models import VOCABULARY, save_random
from torch.autograd import forward_ad

from cachemoe.moe.layers import moe_layers
from cachemoe.moe.load import load, swap
from cachemoe.moe.models import load_model
from cachemoe.moe.strategies import CachePrior
from cachemoe.offload.errors import InputError

pytest.importorskip("transformers")
NEARLY_EXACT = CachePrior(1e-12)
PROMPT = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
each_routing = pytest.mark.parametrize("routing", [None, NEARLY_EXACT])


@contextmanager
def quiet(description, total):
    yield lambda: None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "qwen3"
    save_random("qwen3_moe", folder)
    return folder


@pytest.fixture
def own(folder):
    return load_model(folder)


@pytest.fixture
def opened(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))
    models = []

    def opened(path=folder, **options):
        models.append(load(path, **{"pool": 4, "device": "cpu", "progress": quiet} | options)[0])
        return models[-1]

    yield opened
    for model in models:
        model.cachemoe.close()


def same(model, own, prompt=PROMPT):
    with torch.no_grad():
        ours, theirs = (each(prompt, use_cache=False).logits for each in (model, own))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------- between router and experts


def halved(router, arguments, answer):
    return answer[0], answer[1] * 0.5, answer[2]


def halved_in_place(router, arguments, answer):
    answer[1].mul_(0.5)


def other_experts(router, arguments, answer):
    return answer[0], answer[1], (answer[2] + 1) % 8


def other_experts_in_place(router, arguments, answer):
    answer[2].copy_((answer[2] + 1) % 8)


@each_routing
@pytest.mark.parametrize("hook", [halved, halved_in_place, other_experts, other_experts_in_place])
def test_what_hooks_make_of_a_routers_answer_is_computed(opened, own, routing, hook):
    model = opened(routing=routing)
    for each in (model, own):
        for layer in moe_layers(each):
            layer.router.register_forward_hook(hook)
    with torch.inference_mode():  # whose tensors count no versions
        torch.testing.assert_close(model(PROMPT).logits, own(PROMPT).logits, rtol=1e-4, atol=1e-4)
    same(model, own)


def zeroed(router, arguments, answer):
    answer[1].zero_()


def test_weights_changed_in_a_model_of_16_bits(tmp_path, opened):
    """There the router's answer is not the memory that the engine's routing is in."""
    save_random("qwen3_moe", tmp_path / "bf16", torch.bfloat16)
    model, own = opened(tmp_path / "bf16", routing=NEARLY_EXACT), load_model(tmp_path / "bf16", torch.bfloat16)
    for each in (model, own):
        for layer in moe_layers(each):
            layer.router.register_forward_hook(zeroed)
    same(model, own)


@pytest.mark.parametrize("ids", [8, -1, 1 << 40])
def test_experts_that_do_not_exist_are_refused(opened, ids):
    model = opened()
    with pytest.raises(InputError, match=r"MoE layer 1 is asked for 2 experts a token.* it has 8, and 4 slots"):
        moe_layers(model)[1].experts(torch.ones(1, 32), torch.tensor([[0, ids]]), torch.ones(1, 2))
    same(model, load_model(model.name_or_path))


def test_more_experts_a_token_than_slots_are_refused(opened):
    model = opened(pool=2)
    for layer in moe_layers(model):
        layer.router.top_k = 3
    with pytest.raises(InputError, match="asked for 3 experts a token"):
        model(PROMPT)


# --------------------------------------------------------------------------------------------------- after it is loaded


def test_layers_in_another_order_keep_their_rules(tmp_path, opened):
    """DeepSeek-V3's routers have corrections of their own."""
    save_random("deepseek_v3", tmp_path / "model")
    model, own = opened(tmp_path / "model"), load_model(tmp_path / "model")
    for each in (model, own):
        first, second, third = each.model.layers
        each.model.layers = torch.nn.ModuleList([first, third, second])
    same(model, own)
    model.cachemoe.routing = NEARLY_EXACT
    same(model, own)
    for each in (model, own):
        del each.model.layers[1]
    model.cachemoe.routing = "cache-prior:0.000000000001"
    same(model, own)


def test_a_router_is_asked_each_time_that_a_routing_is_set(opened, own):
    model = opened(routing=NEARLY_EXACT)
    for each in (model, own):
        for layer in moe_layers(each):
            layer.router.norm_topk_prob = not layer.router.norm_topk_prob
    model.cachemoe.routing = NEARLY_EXACT
    same(model, own)
    moe_layers(model)[0].router.top_k = 3
    with pytest.raises(InputError, match="chooses 3 experts, and the model's config says 2"):
        model.cachemoe.routing = CachePrior(0.5)
    assert model.cachemoe.routing == NEARLY_EXACT


def put(experts, name, parameter):
    experts._parameters[name] = parameter


def swapped(experts, name, parameter):
    torch.utils.swap_tensors(getattr(experts, name), parameter)


@pytest.mark.parametrize("way", [put, swapped])
def test_parameters_put_in_past_all_doors_are_refused(opened, way):
    model = opened()
    experts = moe_layers(model)[0].experts
    way(experts, "down_proj", torch.nn.Parameter(torch.zeros(8, 32, 32), requires_grad=False))
    with pytest.raises(InputError, match="do not compute with parameters or an activation put in their place"):
        model(PROMPT)


def test_a_functional_call_with_other_experts_is_refused(opened, own):
    model = opened()
    others = {name: p * 2 for name, p in own.named_parameters() if "experts" in name}
    with torch.no_grad(), pytest.raises(InputError, match="do not compute with parameters"):
        torch.func.functional_call(model, others, (PROMPT,))
    same(model, own)


def test_another_activation_is_refused(opened):
    model = opened()
    moe_layers(model)[0].experts.act_fn = torch.nn.ReLU()
    with pytest.raises(InputError, match="an activation put in their place"):
        model(PROMPT)


def test_experts_with_a_forward_of_their_own_are_not_swapped(own):
    experts = moe_layers(own)[1].experts
    before = experts.forward
    experts.forward = lambda *arguments: before(*arguments) * 2
    with pytest.raises(InputError, match="MoE layer 1 have a forward of their own"):
        swap(own, progress=quiet)


def test_a_routers_forward_that_somebody_removed(opened, own):
    model = opened(routing=NEARLY_EXACT)
    for layer in moe_layers(model):
        del layer.router.forward
    model.cachemoe.routing = None
    same(model, own)


# ------------------------------------------------------------------------------------------------------ transformations


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens, use_cache=False).logits


def test_a_trace_is_refused(opened):
    """It would keep the experts that one input chose."""
    with torch.no_grad(), pytest.raises(InputError, match="cannot be traced"):
        torch.jit.trace(Logits(opened()), PROMPT, check_trace=False)


def test_derivatives_of_every_kind_are_refused(opened):
    experts = moe_layers(opened())[0].experts
    x, ids, weights = torch.ones(1, 32), torch.tensor([[0, 1]]), torch.ones(1, 2)

    def run(x):
        return experts(x, ids, weights).sum()

    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(InputError, match="give no gradients"):
        run(forward_ad.make_dual(x, torch.ones_like(x)))
    with forward_ad.dual_level():  # of something else
        forward_ad.make_dual(x, x)
        assert run(torch.ones(1, 32)).isfinite()
    for transform in (torch.func.grad(run), torch.func.vmap(run)):
        with pytest.raises(InputError, match="give no gradients"):
            transform(x)
    with pytest.raises(InputError, match="give no gradients"):
        torch.func.jvp(run, (x,), (x,))


# ----------------------------------------------------------------------------------------------------------- interrupts


@contextmanager
def interrupted(after):
    """Ctrl-C after that many seconds, if the block has not ended by then."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, after)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("work", ["generate", "resize"])
def test_after_ctrl_c_at_any_moment_the_model_computes_on(opened, own, work):
    """Wherever it came, the next call is right: nothing has to be loaded again."""
    model, draw = opened(pool=2), random.Random(0)
    for turn in range(int(os.environ.get("CACHEMOE_INTERRUPTS", "60"))):
        with interrupted(draw.uniform(2e-4, 2e-2)):
            if work == "generate":
                model.generate(PROMPT[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)
            else:
                for i in range(200):
                    model.cachemoe.resize(2 + (turn + i) % 6)
        same(model, own)
    model.cachemoe.resize(3)
    assert [layer.slots for layer in model.cachemoe.layers] == [3, 3, 3]
    same(model, own)


# ------------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("path", [None, 3, b"x", ["x"], "x" * 5000, "x/" + "y" * 5000])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(InputError) as caught:
        load(path, progress=quiet)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("device", ["meta", "nowhere", 3.5, [], "mps"])
def test_a_device_that_cannot_be_is_refused(folder, device):
    with pytest.raises(InputError, match="device"):
        load(folder, device=device, progress=quiet)


@pytest.mark.parametrize("eviction", [[], 5, "mru"])
def test_an_eviction_policy_that_cannot_be_is_refused(folder, eviction):
    with pytest.raises(InputError, match="unknown eviction policy"):
        load(folder, eviction=eviction, progress=quiet)


def test_a_folder_whose_name_is_no_text(folder, tmp_path, opened, own):
    link = tmp_path / os.fsdecode(b"caf\xe9")
    link.mkdir()
    for file in folder.iterdir():
        (link / file.name).write_bytes(file.read_bytes())
    same(opened(link), own)
