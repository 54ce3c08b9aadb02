"""Finding a router's rule: Phi's against transformers' own, ties, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import MODELS, save_random

from cachemoe.kernels.state import GateScores, Residency
from cachemoe.moe.layers import MoeLayer, moe_layers, probe, recorded_routers, routing_rules
from cachemoe.moe.models import load_model
from cachemoe.moe.routers import RouterOutput, RoutingRule, choose, find_rule, sparsemixer_weights
from cachemoe.offload.errors import InputError
from cachemoe.offload.residency import least_recently_used

TOKENS, EXPERTS, K = 40, 8, 2


def random_logits(seed=0, dtype=torch.float32):
    return torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_sparsemixer_weighs_as_phi_does():
    modeling = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    logits = random_logits()
    weights, ids = modeling.sparsemixer(logits, jitter_eps=0.1, training=False)
    torch.testing.assert_close(sparsemixer_weights(logits, ids, 0.1), weights)


def test_an_expert_that_is_not_the_best_is_weighed_in_its_place():
    logits = torch.tensor([[3.0, 2.9, 2.8, -5.0]])
    weights = sparsemixer_weights(logits, torch.tensor([[1, 2]]), 0.1)
    first = logits[:, :3].softmax(1)[0, 1]
    second = torch.tensor([3.0, 2.8]).softmax(0)[1]
    torch.testing.assert_close(weights, torch.stack((first, second))[None])


def router(function, **attributes):
    """A router that answers by ``function`` of its logits."""
    module = torch.nn.Linear(EXPERTS, EXPERTS, bias=False)
    for name, value in attributes.items():
        setattr(module, name, value)
    logits = random_logits()
    return module, RouterOutput(logits, *function(logits), ("logits", "weights", "ids"))


def softmax_top_k(logits, renormalise=False, scale=1.0):
    weights, ids = logits.softmax(-1).topk(K)
    return (weights / weights.sum(-1, keepdim=True) if renormalise else weights) * scale, ids


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_softmax_rules_are_told_apart(renormalise, scale):
    module, output = router(lambda z: softmax_top_k(z, renormalise, scale), routed_scaling_factor=2.5)
    scores = find_rule(module, torch.nn.Module(), [output]).scores
    assert (scores.function, scores.renormalise, scores.scale) == ("softmax", renormalise, scale)


def test_an_unknown_rule_is_refused():
    module, output = router(lambda z: (z.softmax(-1) ** 2).topk(K))
    with pytest.raises(InputError, match="Linear follows a routing rule that cachemoe does not know"):
        find_rule(module, torch.nn.Module(), [output])


@pytest.mark.parametrize(
    "almost",
    [
        lambda z: softmax_top_k(z.clamp(max=2)),  # cut off where it is large
        lambda z: softmax_top_k(torch.where(torch.arange(len(z))[:, None] == 7, -z, z)),  # one token of 40
        lambda z: softmax_top_k(z, renormalise=True, scale=1.003),
        lambda z: softmax_top_k(z + torch.linspace(0, 0.05, EXPERTS)),  # a correction of no known name
        lambda z: (softmax_top_k(z)[0].flip(-1), softmax_top_k(z)[1]),  # each other's weights
        lambda z: (softmax_top_k(z)[0] + 1e-3, softmax_top_k(z)[1]),
    ],
)
def test_a_rule_that_almost_fits_is_refused(almost):
    module, output = router(almost)
    with pytest.raises(InputError, match="does not know"):
        find_rule(module, torch.nn.Module(), [output])


def test_logits_that_say_nothing_are_no_evidence():
    """All equal: whatever a router takes is a tie."""
    module, _ = router(softmax_top_k)
    logits = torch.zeros(TOKENS, EXPERTS)
    output = RouterOutput(logits, torch.full((TOKENS, K), 1 / EXPERTS), torch.tensor([[6, 7]] * TOKENS), ("logits",))
    with pytest.raises(InputError, match="does not know"):
        find_rule(module, torch.nn.Module(), [output])


class CappedRouter(torch.nn.Module):
    """Softmax but for logits beyond 15, where ordinary ones are not."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(EXPERTS, 32, generator=torch.Generator().manual_seed(0)))
        self.limit = 15.0

    def forward(self, hidden):
        logits = torch.nn.functional.linear(hidden, self.weight)
        return logits, *softmax_top_k(logits.clamp(-self.limit, self.limit))


def test_a_router_is_asked_with_large_logits_too():
    block = torch.nn.Module()
    block.gate, block.experts = CappedRouter(), SimpleNamespace(num_experts=EXPERTS)
    layer = MoeLayer(block, block.experts, block.gate)
    outputs = [probe(layer).output, probe(layer, precisely=True).output]
    with pytest.raises(InputError, match="CappedRouter follows a routing rule"):
        find_rule(block.gate, block, outputs)
    block.gate.limit = float("inf")
    assert find_rule(block.gate, block, [probe(layer).output]).scores == GateScores()


def test_a_router_that_cannot_be_asked_is_refused_in_a_sentence():
    block = torch.nn.Module()
    block.gate, block.experts = torch.nn.Bilinear(4, 4, EXPERTS), SimpleNamespace(num_experts=EXPERTS)
    with pytest.raises(InputError, match="Bilinear is called in a way of its own"):
        probe(MoeLayer(block, block.experts, block.gate))


def test_ties_of_bfloat16_do_not_hide_a_rule():
    module, output = router(softmax_top_k)
    logits = random_logits(dtype=torch.bfloat16)
    weights, ids = logits.float().flip(-1).softmax(-1).topk(K)  # takes the last of equals
    output = RouterOutput(logits, weights.bfloat16(), EXPERTS - 1 - ids, output.order)
    assert find_rule(module, torch.nn.Module(), [output]).scores == GateScores()


@pytest.mark.parametrize("name", MODELS)
def test_a_rule_chooses_what_the_router_chooses(tmp_path, name):
    save_random(name, tmp_path / "model")
    model = load_model(tmp_path / "model")
    layers = moe_layers(model)
    with torch.inference_mode(), recorded_routers(model) as answers:
        model(torch.randint(3, 96, (1, 64), generator=torch.Generator().manual_seed(2)))
    for layer, rule, (answer,) in zip(layers, routing_rules(layers, answers[0][0].ids.shape[1]), answers, strict=True):
        k = answer.ids.shape[1]
        state = Residency.empty(torch.tensor([layer.count]), layer.count)
        routing = choose(rule, answer.logits[None], state, least_recently_used, k)
        chosen, order = answer.ids.sort(1)
        ours, our_order = routing.ids[0].sort(1)
        assert torch.equal(ours, chosen)
        torch.testing.assert_close(routing.weights[0].gather(1, our_order), answer.weights.gather(1, order))


def test_answers_are_told_apart_whatever_their_order():
    logits, weights, ids = random_logits(), torch.rand(TOKENS, K), torch.zeros(TOKENS, K, dtype=torch.int64)
    for answer in ((logits, weights, ids), (ids, weights, logits), (weights, logits, ids)):
        output = RouterOutput.of(answer, EXPERTS)
        assert output.logits is logits and output.weights is weights and output.ids is ids
        again = output.like(logits, weights, ids)
        assert all(torch.equal(a, b) for a, b in zip(again, answer, strict=True))


@pytest.mark.parametrize("answer", [torch.zeros(3, EXPERTS), (torch.zeros(3, EXPERTS),), (torch.zeros(3, K),) * 3])
def test_other_answers_are_refused(answer):
    with pytest.raises(InputError, match="do not answer with logits, weights and ids"):
        RouterOutput.of(answer, EXPERTS)


def test_a_rule_weighs_into_memory_that_is_given():
    rule = RoutingRule(GateScores(), weigh=lambda logits, ids: torch.full(ids.shape, 0.25))
    state = Residency.empty(torch.tensor([EXPERTS]), EXPERTS)
    routing = choose(rule, random_logits()[None], state, least_recently_used, K)
    assert (routing.weights == 0.25).all()
