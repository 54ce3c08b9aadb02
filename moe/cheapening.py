"""What a cheaper level costs, expert by expert: for a precision of each expert's own, and for evicting by precision."""

from collections.abc import Callable, Sequence
from itertools import product

import torch

from cachemoe.kernels.policy import Policy
from cachemoe.kernels.route import route
from cachemoe.kernels.state import Residency, Routing
from cachemoe.moe.calibration import PARTS
from cachemoe.moe.layers import moe_layers
from cachemoe.moe.leveled import LeveledExperts
from cachemoe.moe.policies import hobbit
from cachemoe.moe.quality import log_probabilities
from cachemoe.moe.routers import RoutingRule, own_choice
from cachemoe.moe.shape import MoeShape
from cachemoe.moe.sizes import LevelBytes, split_pool
from cachemoe.moe.strategies import Strategy
from cachemoe.moe.swap import Swap

STEPS = 4  # in which the weights of an eviction policy, which sum to it, are tried
T1, T2 = 0.6, 0.9  # of the paper, by which the policy is fitted


def importance(full: torch.Tensor, cheap: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``[E]`` what each expert's rounding adds to the layer's output, squared, as a share of the output's square.

    A stand-in: EdgeMoE (arXiv 2308.14352) measures the accuracy lost by each expert alone.

    Args:
        full, cheap: ``[E, T, H]``, every expert's output for every token.
        ids, weights: ``[T, K]``, of the tokens.
    """
    tokens = torch.arange(len(ids))[:, None]
    output = (weights[..., None] * full[ids, tokens]).sum(1)
    added = weights.square() * (full[ids, tokens] - cheap[ids, tokens]).square().sum(-1)
    sums = torch.zeros(len(full), dtype=torch.float64).index_add_(0, ids.flatten(), added.flatten().double())
    return (sums / output.double().square().sum().clamp(min=1e-30)).float()


@torch.inference_mode()
def cheap_losses(
    model, shape: MoeShape, rules: Sequence[RoutingRule], windows: torch.Tensor, order: torch.Tensor,
    leveled: LeveledExperts, advance: Callable[[], None],
) -> torch.Tensor:  # fmt: skip
    """``[PARTS + 1]`` nats a token that are lost if the first 0, 1, ... parts of the experts are cheap.

    Args:
        windows: ``[windows, context]`` tokens.
        order: ``[L * E]``, all experts, the least important first.
    """
    layers = moe_layers(model)
    losses = []
    for part in range(PARTS + 1):
        table = torch.zeros(len(order), dtype=torch.int64)
        table[order[: len(order) * part // PARTS]] = 1
        levels = table.view(len(layers), shape.experts)

        def run(layer, hidden, routing, levels=levels):
            return leveled.run(layer, hidden, routing.ids[0], routing.weights[0], levels[layer][routing.ids[0]])

        nats = 0.0
        with Swap(model, _own(rules, shape), run):
            for window in windows:
                log_p = log_probabilities(model(window[None].to(model.device)).logits[0, :-1])
                nats -= float(log_p.gather(-1, window[1:, None].to(log_p.device)).double().sum())
                advance()
        losses.append(nats / windows[:, 1:].numel())
    return torch.tensor([loss - losses[0] for loss in losses])


def _own(rules: Sequence[RoutingRule], shape: MoeShape) -> Callable:
    """The model's own choice, as a route."""

    def choose(layer, logits, hidden):
        ids, weights = own_choice(rules[layer], logits.cpu(), shape.top_k)
        return Routing.all_hits(ids[None], weights[None])

    return choose


def hobbit_weights(
    logits: Sequence[torch.Tensor], rules: Sequence[RoutingRule], shape: MoeShape, page_bytes: Sequence[int],
    advance: Callable[[], None],
) -> torch.Tensor:  # fmt: skip
    """``[4]`` the weights of HOBBIT's eviction policy that cost least in misses, by their bytes, in half of the pool.

    Of recency, frequency, frequency at full precision and nearness, in quarters, on a recorded text from cold caches.

    Args:
        logits: of each layer, ``[T, E]``.
        page_bytes: of full precision, and of the cheaper level.
    """
    layers, k = len(logits), shape.top_k
    half = [max(round(shape.experts / 2), k)] * layers
    capacity, cheaper = split_pool(half, Strategy("hobbit"), LevelBytes(page_bytes), shape.experts, k)
    knobs = torch.tensor([[0.0, T1, T2, 0.0, torch.inf, 0.0]])
    policy = Policy(grade=hobbit.grade, knobs=knobs, renormalises=False)
    penalties = {}
    for weights in product(range(STEPS + 1), repeat=4):
        if sum(weights) != STEPS:
            continue
        evict = hobbit.eviction(weights, layers, k)
        state, misses = Residency.empty(torch.tensor(capacity), shape.experts, cheaper, layers), [0, 0]
        for t in range(len(logits[0])):
            for layer, (rule, each) in enumerate(zip(rules, logits, strict=True)):
                token = each[None, t : t + 1]
                routing = route(token, state.of_layer(layer), evict, k, policy, rule.scores, rule.correction)
                missed = routing.misses.pages[0, : routing.misses.count[0]]
                cheap = int((missed >= shape.experts).sum())
                misses[0] += len(missed) - cheap
                misses[1] += cheap
        penalties[weights] = misses[0] + misses[1] * page_bytes[1] / page_bytes[0]
        advance()
    return torch.tensor(min(penalties, key=penalties.__getitem__), dtype=torch.int16)
