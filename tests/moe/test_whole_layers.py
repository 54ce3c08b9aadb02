"""A token through a decoder layer, experts included, in one call: held to the same model by its modules."""

import threading

import pytest
import torch
from tiny_models import MODELS, VOCABULARY

from cachemoe.kernels import layer_cpu
from cachemoe.moe.load import load
from cachemoe.offload.errors import InputError

pytestmark = pytest.mark.skipif(not layer_cpu.has_c(), reason="there is no C compiler")
TOKENS = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(1))
# Layers of three whose block is router and experts alone.
WHOLE = {"qwen3_moe": 3, "olmoe": 3, "mixtral": 3, "granitemoe": 3, "minimax_m2": 3}
ROUTINGS = "original", "cache-prior:0.5", "max-rank:4", "cumsum:0.7", "pruning:1", "random-swap:0.3", "pregated-exec"


@pytest.fixture
def pair(folders, tmp_path, monkeypatch, quiet):
    """The same model twice: its layers in one call where they can be, and by their modules."""
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))
    models = []

    def pair(name="qwen3_moe", dtype=torch.float32, **options):
        options = {"pool": 4, "device": "cpu", "dense": "int8", "format": "int8", "progress": quiet} | options
        models.extend(load(folders(name, dtype), **options)[0] for _ in range(2))
        by_modules(models[-1])
        return models[-2:]

    yield pair
    for model in models:
        model.cachemoe.close()


def by_modules(model):
    for step in model.cachemoe._steps.values():
        step.whole = None


def taken(model, calls):
    """Append to ``calls`` the number of each layer that takes a token in one call."""
    engine, own = model.cachemoe.engine, model.cachemoe.engine.step

    def step(number, *arguments):
        y = own(number, *arguments)
        calls.append((number, y is not None))
        return y

    engine.step = step


@torch.inference_mode()
def run(model, cuts=(6, *range(7, 25)), tokens=TOKENS):
    logits, first, cache = [], 0, None
    for end in cuts:
        output = model(tokens[:, first:end], past_key_values=cache, use_cache=True)
        cache, first = output.past_key_values, end
        logits.append(output.logits)
    return torch.cat(logits, 1)


def assert_same(one, other, tolerance=1e-4):
    given, expected = run(one), run(other)
    torch.testing.assert_close(given, expected, rtol=tolerance, atol=tolerance)
    for name, tensor in one.cachemoe.engine.state.tensors().items():
        torch.testing.assert_close(tensor, other.cachemoe.engine.state.tensors()[name], msg=name)
    a, b = (each.cachemoe.counters for each in (one, other))
    for name in ("calls", "selections", "hits", "misses", "drops", "pages_read"):
        assert getattr(a, name) == getattr(b, name), name
    mine, theirs = ([(c.selections, c.misses) for c in each.cachemoe.layers] for each in (one, other))
    assert mine == theirs
    return expected


@pytest.mark.parametrize("name", MODELS)
def test_every_family_decodes_as_by_its_modules(pair, name):
    one, other = pair(name)
    calls = []
    taken(one, calls)
    assert_same(one, other)
    assert len({number for number, whole in calls if whole}) == WHOLE.get(name, 0), name
    assert all(whole for _, whole in calls)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("eviction", ["lru", "lfu"])
def test_every_routing_chooses_and_places_as_by_the_modules(pair, routing, eviction):
    one, other = pair(routing=routing, eviction=eviction)
    calls = []
    taken(one, calls)
    assert_same(one, other)
    assert bool(calls) == (routing != "pregated-exec")
    one.cachemoe.routing = other.cachemoe.routing = "cache-prior:0.8"  # another between two tokens
    by_modules(other)
    del calls[:]
    assert_same(one, other)
    assert calls


def test_in_bfloat16_experts_are_the_modules_but_for_rounding(pair):
    one, other = pair(dtype=torch.bfloat16, format="int4", dense="int4")
    given, expected = run(one), run(other)
    errors = (given - expected).float().abs().amax(-1) / expected.abs().max()
    assert (errors < 0.03).float().mean() > 0.8  # one whose router was undecided may have gone another way


def test_the_pool_grows_and_shrinks_between_two_tokens(pair):
    one, other = pair()
    for slots in (6, 2, 8, 3):
        for each in (one, other):
            each.cachemoe.resize(slots)
        assert_same(one, other)


def _forward(block):
    own = block.forward
    block.forward = lambda hidden: 0.5 * own(hidden)


CHANGES = {
    "router's weight": lambda block: setattr(
        block.gate, "weight", torch.nn.Parameter(block.gate.weight.detach().flip(0).clone())
    ),
    "other numbers": lambda block: setattr(block.gate.weight, "data", block.gate.weight.data.flip(0).clone()),
    "in place": lambda block: block.gate.weight.data.mul_(-1.5),
    "experts of a token": lambda block: setattr(block.gate, "top_k", 1),
    "hook on the router": lambda block: block.gate.register_forward_hook(lambda *a: (a[2][0], 2 * a[2][1], a[2][2])),
    "hook on the block": lambda block: block.register_forward_hook(lambda module, given, y: 0.1 * y),
    "hook on the experts": lambda block: block.experts.register_forward_pre_hook(lambda m, a: (0.3 * a[0], *a[1:])),
    "forward of the block": _forward,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_in_a_block_counts(pair, change):
    one, other = pair()
    before = assert_same(one, other)
    for each in (one, other):
        CHANGES[change](each.model.layers[1].mlp)
    assert not torch.allclose(assert_same(one, other), before, rtol=1e-3)


def test_an_activation_put_in_its_place_is_refused(pair):
    one, _ = pair()
    run(one)
    one.model.layers[1].mlp.experts.act_fn = torch.nn.ReLU()
    with pytest.raises(InputError, match="activation"):
        run(one)


def test_a_router_gone_astray_is_the_modules_to_serve(pair):
    one, other = pair(routing="cache-prior:0.5")
    for each in (one, other):
        each.model.layers[1].mlp.gate.weight.data[3] = float("nan")
    run(one), run(other)
    for name, tensor in one.cachemoe.engine.state.tensors().items():
        torch.testing.assert_close(tensor, other.cachemoe.engine.state.tensors()[name], equal_nan=True, msg=name)


def test_threads_decode_at_the_same_time(pair):
    one, other = pair(pool=3)
    texts = [torch.roll(TOKENS, i, 1) for i in range(3)]
    expected, given = [run(other, tokens=text) for text in texts], [None] * len(texts)

    def decode(i):
        given[i] = run(one, tokens=texts[i])

    threads = [threading.Thread(target=decode, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_page_that_cannot_be_read_raises_and_the_next_token_is_right(pair, monkeypatch):
    one, other = pair(pool=2)
    assert_same(one, other)
    own = one.cachemoe.engine._link.request

    def fail(*arguments, **more):
        raise OSError("the disk is gone")

    monkeypatch.setattr(one.cachemoe.engine._link, "request", fail)
    with pytest.raises(OSError, match="gone"):
        run(one)
    monkeypatch.setattr(one.cachemoe.engine._link, "request", own)
    torch.testing.assert_close(run(one), run(other), rtol=1e-4, atol=1e-4)


def test_closed_experts_raise(pair):
    one, _ = pair()
    run(one)
    one.cachemoe.close()
    with pytest.raises(RuntimeError, match="closed"):
        run(one)


def test_a_norm_given_other_numbers_counts(pair):
    one, other = pair()
    before = assert_same(one, other)
    for each in (one, other):
        weight = each.model.layers[1].post_attention_layernorm.weight
        weight.data = torch.linspace(0.2, 2, len(weight))
    assert not torch.allclose(assert_same(one, other), before, rtol=1e-3)


def test_another_dtype_is_the_modules_to_compute_in(pair):
    one, other = pair()
    run(one), run(other)
    for each in (one, other):
        each.to(torch.bfloat16)
    torch.testing.assert_close(run(one), run(other))


def _correction(block):
    block.e_score_correction_bias = torch.linspace(3, -3, len(block.e_score_correction_bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_correction_put_in_its_place_or_written_to_counts(pair, dtype):
    one, other = pair("minimax_m2", dtype)
    run(one), run(other)
    for change in (_correction, lambda block: block.e_score_correction_bias.mul_(-1)):
        for each in (one, other):
            change(each.model.layers[1].mlp)
        torch.testing.assert_close(run(one), run(other), rtol=1e-4, atol=1e-4)


def test_a_class_that_is_patched_and_hooks_of_all_modules_count(pair, monkeypatch):
    one, other = pair()
    before = assert_same(one, other)
    kind = type(one.model.layers[0].mlp)
    forward = kind.forward
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", lambda block, hidden: 0.2 * forward(block, hidden))
        assert not torch.allclose(assert_same(one, other), before, rtol=1e-3)
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, given, y: 0.2 * y if isinstance(module, kind) else None
    )
    try:
        assert not torch.allclose(assert_same(one, other), before, rtol=1e-3)
    finally:
        hook.remove()
    torch.testing.assert_close(assert_same(one, other), before, rtol=1e-4, atol=1e-4)


def test_hooks_that_transformers_leaves_behind_end_nothing(pair):
    one, other = pair()
    calls = []
    taken(one, calls)
    for each in (one, other):
        output = each(TOKENS[:, :6], output_router_logits=True, output_hidden_states=True, use_cache=True)
        cache = output.past_key_values
        output = each(TOKENS[:, 6:7], past_key_values=cache, output_router_logits=True)
        assert len(output.router_logits) == 3  # recorded, so that the modules computed
    assert not calls
    assert_same(one, other)
    assert len(calls) == 3 * 18


def test_a_routing_that_is_refused_ends_nothing(pair):
    one, other = pair(routing="cache-prior:0.5")
    calls = []
    taken(one, calls)
    with pytest.raises(InputError):
        one.cachemoe.routing = "pregated-hint"  # which wants room to fetch ahead
    own, one.cachemoe._router = one.cachemoe._router, lambda _: (_ for _ in ()).throw(InputError("no"))
    with pytest.raises(InputError):
        one.cachemoe.routing = "max-rank:4"
    one.cachemoe._router = own
    assert_same(one, other)
    assert len(calls) == 3 * 18


def test_a_thread_goes_on_while_the_routing_is_set(pair):
    one, other = pair()
    expected, given, done = run(other, cuts=(24,)), [], threading.Event()

    def prompts():
        while not done.is_set():
            given.append(run(one, cuts=(24,)))

    thread = threading.Thread(target=prompts)
    thread.start()
    for _ in range(15):
        one.cachemoe.routing = "original"
    done.set()
    thread.join()
    for each in given:
        torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-4)
