"""Every kernel in plain PyTorch. This is the specification that the kernels are held to, bit by bit where integers are.

Shapes: B caches stepped side by side (configurations of an experiment; 1 in inference), T tokens, E experts, K used.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cachemoe.kernels.activations import activate
from cachemoe.kernels.formats import PageFormat


@dataclass(frozen=True)
class Routing:
    """What ``route`` decided.

    Args:
        ids: ``[B, T, K]`` int64, distinct experts of each token, highest gate weight first.
        weights: ``[B, T, K]`` float32, gate weights, from the unbiased logits.
        slots: ``[B, T, K]`` int64, where each expert's page is, or is to be fetched to, when the token computes.
        hits: ``[B, T, K]`` bool, whether the expert was resident when the token was routed.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    slots: torch.Tensor
    hits: torch.Tensor


@dataclass(frozen=True)
class CacheBias:
    """How much residency sways the selection; one number for all B caches, or ``[B]`` each. All zero: not at all.

    Args:
        top_j: J, the best-ranked experts that are always kept; all K where K is less.
        window: M, residents among the M best-ranked come before all others (max-rank, the paper's algorithm 1).
        mass: p, as ``window``, with M the fewest best-ranked experts whose probabilities sum to p (cumsum, its
            algorithm 2). p = 0 is no window.
        prior: lambda, residents are ranked by logit + lambda * the layer's mean logit range (cache-prior). Not
            together with ``window`` or ``mass`` in one cache.
    """

    top_j: int | torch.Tensor = 0
    window: int | torch.Tensor = 0
    mass: float | torch.Tensor = 0.0
    prior: float | torch.Tensor = 0.0


NO_BIAS = CacheBias()


@torch.no_grad()
def route(
    logits: torch.Tensor, state, evict: Callable, top_k: int, bias: CacheBias = NO_BIAS, renormalise: bool = False
) -> Routing:
    """Select experts token by token; each token sees the residency that the tokens before it left.

    Args:
        logits: ``[B, T, E]`` floating point router logits.
        state: ``Residency`` of B caches; updated in place.
        evict: eviction policy, ``state -> [B, E]`` keys, the smallest leaves.
        top_k: K.
        bias: the routing strategy, see ``CacheBias``.
        renormalise: whether the K gate weights are scaled to sum to 1, as the model was trained.

    Returns:
        The ``Routing``. Ties go to the lower expert id; misses take the free or evicted slots in order of gate weight.

    Raises:
        ValueError: if a capacity is below K, since a slot needed by the same token is never a victim.
    """
    if int(state.capacity.min()) < top_k:
        raise ValueError(f"{int(state.capacity.min())} slots cannot hold the {top_k} experts of one token")
    logits = logits.float()
    _, tokens, experts = logits.shape
    order = logits.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(experts, device=logits.device).expand_as(order))
    probabilities = logits.softmax(-1)
    base, boost = _base_and_boost(logits, order, rank, probabilities, state, top_k, bias)

    ids, slots, hits = [], [], []
    for t in range(tokens):
        score = base[:, t] + boost[:, t] * state.resident()
        chosen = score.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
        # Highest gate weight first: the chosen experts in the order of their unbiased rank.
        chosen = order[:, t].gather(1, rank[:, t].gather(1, chosen).sort(-1).values)
        chosen_slots, chosen_hits = _touch_and_place(chosen, state, evict)
        ids.append(chosen)
        slots.append(chosen_slots)
        hits.append(chosen_hits)

    ids = torch.stack(ids, 1)
    weights = probabilities.gather(-1, ids)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(ids, weights, torch.stack(slots, 1), torch.stack(hits, 1))


def _base_and_boost(logits, order, rank, probabilities, state, top_k, bias):
    """``[B, T, E]`` score of an absent expert, and what residency adds to it. Updates the mean logit range."""

    def per_cache(value):
        return torch.as_tensor(value, device=logits.device).reshape(-1, 1)  # [B or 1, 1], against [B, T]

    tokens, experts = logits.shape[1:]
    ranges = (logits.amax(-1) - logits.amin(-1)).double()
    seen = state.tokens[:, None] + torch.arange(tokens, device=logits.device)
    # Summed in order in float64, so that a sequence cut anywhere gives the same bits.
    range_sum = torch.cumsum(torch.cat((state.range_sum[:, None], ranges), 1), 1)
    mean_range = (range_sum[:, :-1] / seen.clamp(min=1)).float()  # over the tokens before each token
    state.range_sum.copy_(range_sum[:, -1])
    state.tokens += tokens

    # Windowed strategies rank by position, exact in float32; cache-prior ranks by logit. Without bias both agree.
    base, boost = -rank.float(), logits.new_zeros(1, 1, 1)
    if _in_use(bias.window) or _in_use(bias.mass):
        mass = per_cache(bias.mass)
        before = probabilities.gather(-1, order).cumsum(-1).roll(1, -1)
        before[..., 0] = 0.0
        # All experts sum to 1 whatever float32 says: p = 1 is a window of all.
        mass_window = ((before < mass[..., None]) | (mass[..., None] >= 1)).sum(-1)
        window = torch.maximum(per_cache(bias.window), mass_window)  # [B, T]
        boost = torch.where(rank < window[..., None], float(experts), 0.0)
    if _in_use(bias.prior):
        prior = per_cache(bias.prior)
        by_logit = (prior > 0)[..., None]
        base = torch.where(by_logit, logits, base)
        boost = torch.where(by_logit, (prior * mean_range)[..., None], boost)
    always = rank < per_cache(bias.top_j).clamp(max=top_k)[..., None]
    return base.masked_fill(always, torch.inf), boost.expand_as(base)


def _in_use(parameter):
    """Whether a parameter of ``CacheBias`` can matter: decode is spared what no cache asks for."""
    return isinstance(parameter, torch.Tensor) or parameter != 0


def _touch_and_place(chosen, state, evict):
    """One token's residency update: touch its experts, give those absent the slots of the experts that leave.

    Args:
        chosen: ``[B, K]`` int64, highest gate weight first; touched in reverse, so that it leaves last.

    Returns:
        ``[B, K]`` slots and hits.
    """
    k = chosen.shape[1]
    slots = state.slot_of.gather(1, chosen)
    hits = slots >= 0
    untouched = state.clock[:, None].clone()
    state.last_use.scatter_(1, chosen, untouched + torch.arange(k, 0, -1, device=chosen.device))
    state.uses.scatter_add_(1, chosen, torch.ones_like(chosen))
    state.clock += k
    if bool(hits.all()):
        return slots, hits

    # Victims by slot: free slots first, lowest first, then residents by the policy's key; never one just touched.
    expert_of, capacity = state.expert_of, state.expert_of.shape[1]
    occupant = expert_of.clamp(min=0)
    slot = torch.arange(capacity, device=chosen.device)
    key = torch.where(expert_of < 0, slot - capacity - 1, evict(state).gather(1, occupant))
    never = torch.iinfo(torch.int64).max
    just_touched = (expert_of >= 0) & (state.last_use.gather(1, occupant) > untouched)
    key = key.masked_fill(just_touched | (slot >= state.capacity[:, None]), never)
    victims = key.argsort(dim=-1, stable=True)[:, :k]
    nth_miss = ((~hits).cumsum(1) - 1).clamp(min=0)
    slots = torch.where(hits, slots, victims.gather(1, nth_miss))

    leaving = expert_of.gather(1, slots)
    leaving = torch.where(
        leaving < 0, chosen, leaving
    )  # a free slot: the entry is overwritten on the next line but one
    state.slot_of.scatter_(1, leaving, -1)
    state.slot_of.scatter_(1, chosen, slots)
    expert_of.scatter_(1, slots, chosen)
    return slots, hits


def experts(
    x: torch.Tensor, slots: torch.Tensor, gates: torch.Tensor, weights: dict[str, torch.Tensor], page_format: PageFormat
) -> torch.Tensor:
    """y[t] = sum over k of gates[t, k] * down[s](act(gate[s] x[t]) * (up[s] x[t])), s = slots[t, k].

    Args:
        x: ``[T, H]``.
        slots, gates: ``[T, K]``.
        weights: ``gate_up`` ``[S, 2I, H]`` and ``down`` ``[S, H, I]`` as numbers, and the biases where there are any.
        page_format: what is computed with them; its kind does not matter.

    Returns:
        ``[T, H]`` in x's dtype; accumulated in float32.
    """
    weights = {name: weight.float() for name, weight in weights.items()}
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for k in range(slots.shape[1]):
        s = slots[:, k]
        rows = torch.einsum("th,tih->ti", x.float(), weights["gate_up"][s])
        if page_format.bias:
            rows += weights["gate_up_bias"][s]
        result = torch.einsum("ti,thi->th", activate(rows, page_format), weights["down"][s])
        if page_format.bias:
            result += weights["down_bias"][s]
        y += gates[:, k, None].float() * result
    return y.to(x.dtype)
