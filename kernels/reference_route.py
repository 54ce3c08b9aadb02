"""Routing in plain PyTorch: the specification that numpy and the kernel are held to, bit by bit where integers are.

Shapes: B caches stepped side by side (configurations of an experiment; 1 in inference), T tokens, E experts, K used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from cachemoe.kernels.policy import KNOBS, ORIGINAL, Policy, noise_bits
from cachemoe.kernels.state import SOFTMAX, GateScores, Residency, Routing


@torch.no_grad()
def route(
    logits: torch.Tensor,
    state: Residency,
    evict: Callable,
    top_k: int,
    policy: Policy = ORIGINAL,
    scores: GateScores = SOFTMAX,
    correction: torch.Tensor | None = None,
) -> Routing:
    """Select experts token by token; each token sees the residency that the tokens before it left.

    An expert's *selection value* is its logit or, with a correction, its score plus correction; the higher comes first,
    NaN before all, and ties go to the lower id.

    Args:
        logits: ``[B, T, E]`` floating point router logits.
        state: ``Residency`` of B caches; updated in place.
        evict: eviction policy, (last_use, uses) -> int64 keys; of the residents that the token does not need the
            smallest leaves, the lower slot among equals.
        top_k: K, the places that a policy may drop experts from.
        policy: see ``Policy``.
        scores: how the model scores and groups its experts.
        correction: ``[E]`` or ``[B, E]`` float32 that only the selection sees (DeepSeek-V3).

    Returns:
        The ``Routing``. Misses take the free slots, lowest first, then the evicted ones, by descending gate weight.

    Raises:
        ValueError: if a capacity is below K, since a slot needed by the same token is never a victim; or if ``scores``
            does not fit E and K.
    """
    caches, tokens, experts = logits.shape
    scores.check(experts, top_k)
    if int(state.capacity.min()) < top_k:
        raise ValueError(f"{int(state.capacity.min())} slots cannot hold the {top_k} experts of one token")
    logits = logits.float()
    gates = gate_scores(logits, scores)
    values = logits if correction is None else gates + correction.float().reshape(-1, 1, experts)
    allowed = candidates(values, gates if correction is None else values, scores)
    order = _order(~allowed, values, descending=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(experts, device=logits.device).expand_as(order))

    seen = _words_of_tokens(policy, values, gates, order, rank, scores, state)

    def choose(t):
        chosen = order[:, t, :top_k]
        words = {name: each[:, t] for name, each in seen.items()}
        if policy.grade or policy.key:
            words["have"] = state.resident().int()
            words["cost"] = torch.where(state.resident(), 0.0, policy.knobs[:, KNOBS.index("miss"), None])
        if policy.key is not None:
            key = policy.key(*(words[word] for word in policy.words)).float().expand(caches, experts)
            tier = torch.full_like(rank[:, t], 2)
            tier[allowed[:, t]] = 1
            tier[rank[:, t] < policy.knobs[:, :1].clamp(max=top_k)] = 0
            chosen = _order(tier, key, descending=True)[:, :top_k]
        # Highest gate weight first: the chosen experts in the order of their unbiased rank.
        ranks = rank[:, t].gather(1, chosen).sort(-1).values
        if policy.bounded:
            regret = policy.knobs[:, KNOBS.index("regret")]
            ranks = _bounded(ranks, gates[:, t].gather(1, order[:, t]), regret)
        chosen = order[:, t].gather(1, ranks)
        return chosen, _kept(policy, chosen, gates[:, t], words)

    out = Routing.empty(caches, tokens, top_k, logits.device)
    _step(choose, state, evict, out)
    out.weights.copy_(_weights(gates.gather(-1, out.ids).masked_fill(out.slots < 0, 0.0), scores))
    return out


@torch.no_grad()
def own_choice(
    logits: torch.Tensor, top_k: int, scores: GateScores = SOFTMAX, correction: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[..., K]`` ids and weights that a model chooses by itself, for logits ``[..., E]``; nothing is stepped."""
    logits = logits.float()
    gates = gate_scores(logits, scores)
    values = logits if correction is None else gates + correction.float()
    if scores.top_groups < scores.groups:
        allowed = candidates(values, gates if correction is None else values, scores)
        ids = _order(~allowed, values, descending=True)[..., :top_k]
    else:
        ids = values.argsort(dim=-1, descending=True, stable=True)[..., :top_k]
    return ids, _weights(gates.gather(-1, ids), scores)


def _weights(gates, scores):
    """Of the scores ``[..., K]`` of chosen experts, 0 where dropped."""
    if scores.renormalise:
        gates = gates / (gates.sum(-1, keepdim=True) + scores.epsilon)
    return gates * scores.scale


def _words_of_tokens(policy, values, gates, order, rank, scores, state):
    """``[B, T, E]`` by name: of what a policy can see that which does not depend on who is resident."""
    _, tokens, experts = values.shape
    first, mean_range = state.tokens.clone(), _mean_range(values, state)
    if policy.knobs is None:
        return {}
    seen = {"value": values, "rank": rank.float(), "span": mean_range[..., None]}
    for knob in "ab":
        seen[knob] = policy.knobs[:, None, KNOBS.index(knob), None].expand(-1, tokens, -1)
    if "before" in policy.words:
        seen["before"] = _before(gates, order, scores)
    index = (first[:, None] + torch.arange(tokens, device=values.device))[..., None] * experts
    index = index + torch.arange(experts, device=values.device)
    seed = policy.knobs[:, KNOBS.index("seed")].long() << 24
    seen["noise"] = noise_bits(index + seed[:, None, None]).float() * 2.0**-24
    return seen


def _bounded(ranks, scores, regret):
    """The ranks ``[B, K]`` chosen, ascending, with those swaps undone that give up ``regret`` ``[B]`` or more.

    Args:
        scores: ``[B, E]`` by rank.
    """
    bounded = []
    for row, by_rank, bound in zip(ranks.tolist(), scores, regret, strict=True):
        own = range(len(row))
        brought_in, left = [r for r in row if r not in own], [r for r in own if r not in row]
        for new, old in zip(brought_in, reversed(left), strict=True):
            if not (0 < bound and by_rank[old] - by_rank[new] < bound):  # a correction may rank a lower score better
                row[row.index(new)] = old
        bounded.append(sorted(row))
    return torch.tensor(bounded, device=ranks.device)


def _kept(policy, chosen, gates, words):
    """``[B, K]`` bool: the chosen that run."""
    if policy.grade is None:
        return torch.ones_like(chosen, dtype=torch.bool)
    place = torch.arange(chosen.shape[1], device=chosen.device)
    weight = gates.gather(1, chosen)
    # Summed place by place in float32, whatever the device.
    weight = weight / _running(weight)[:, -1:].clamp(min=torch.finfo(torch.float32).tiny)
    before = torch.cat((torch.zeros_like(weight[:, :1]), _running(weight)[:, :-1]), 1)
    seen = {"weight": weight, "first": weight[:, :1], "before": before, "place": place.float().expand_as(weight)}
    seen |= {"a": words["a"], "b": words["b"]}
    for name in ("value", "have", "cost", "noise"):
        seen[name] = words[name].gather(1, chosen)
    level = policy.grade(*(seen[word] for word in policy.grade_words))
    return ~((level < 0) & (place > 0)).expand(chosen.shape)


def _running(values):
    """``[B, K]`` the sums up to and with each place."""
    sums = [values[:, 0]]
    for value in values.T[1:]:
        sums.append(sums[-1] + value)
    return torch.stack(sums, 1)


@torch.no_grad()
def place(
    ids: torch.Tensor, weights: torch.Tensor, state, evict: Callable, drops: torch.Tensor | None = None
) -> Routing:
    """``route`` where the model has chosen already: its experts touched and placed token by token, nothing else.

    The state's ``tokens`` and ``range_sum``, which only a bias looks at, stay as they are.

    Args:
        ids: ``[B, T, K]`` int64, distinct experts of each token.
        weights: ``[B, T, K]`` their gate weights; each token's experts are put in their order, the highest first.
        state, evict: as for ``route``.
        drops: ``[B, T, K]`` bool, those that do not run; None: all run.

    Raises:
        ValueError: if a capacity is below K.
    """
    caches, tokens, top_k = ids.shape
    if int(state.capacity.min()) < top_k:
        raise ValueError(f"{int(state.capacity.min())} slots cannot hold the {top_k} experts of one token")
    order = weights.argsort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    out = Routing.empty(caches, tokens, top_k, ids.device)
    weights = weights.gather(-1, order)
    kept = torch.ones_like(ids, dtype=torch.bool) if drops is None else ~drops.gather(-1, order)
    _step(lambda t: (ids[:, t], kept[:, t]), state, evict, out)
    out.weights.copy_(weights)
    return out


def _step(choose: Callable, state, evict: Callable, out: Routing) -> None:
    """Touch and place token after token what ``choose(t)`` says then, ``[B, K]`` experts and which of them run; fills
    ``out`` but for the weights."""
    for t in range(out.ids.shape[1]):
        out.ids[:, t], kept = choose(t)
        out.slots[:, t], out.hits[:, t] = _touch_and_place(out.ids[:, t], kept, state, evict)
    missed = ~out.hits & (out.slots >= 0)
    for b, missing in enumerate(missed):
        count = int(missing.sum())
        out.misses.count[b] = count
        for listed, chosen in ((out.misses.experts, out.ids), (out.misses.slots, out.slots)):
            listed[b] = -1
            listed[b, :count] = chosen[b][missing]


@torch.no_grad()
def route_hidden(hidden, router, state, evict, top_k, policy=ORIGINAL, scores=SOFTMAX, correction=None):
    """``route`` from hidden states ``[B, T, H]`` and the router's weight ``[E, H]`` or ``[B, E, H]``.

    Returns:
        The logits ``[B, T, E]`` in the hidden states' dtype, accumulated in float32, and their ``Routing``.
    """
    logits = (hidden.float() @ router.float().mT).to(hidden.dtype)
    return logits, route(logits, state, evict, top_k, policy, scores, correction)


def gate_scores(logits: torch.Tensor, scores: GateScores) -> torch.Tensor:
    """``[..., E]`` float32: the scores of float32 logits."""
    if scores.function == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if scores.function == "sigmoid" else logits.relu()


def candidates(values: torch.Tensor, corrected: torch.Tensor, scores: GateScores) -> torch.Tensor:
    """``[..., E]`` bool: the experts in the groups that a token may choose from.

    Args:
        values: ``[..., E]`` selection values.
        corrected: ``[..., E]`` scores plus the correction, if there is one.
    """
    if scores.top_groups == scores.groups:
        return torch.ones_like(values, dtype=torch.bool)
    if scores.group_score == "best":
        score = values.unflatten(-1, (scores.groups, -1)).amax(-1)
    else:
        score = corrected.unflatten(-1, (scores.groups, -1)).topk(2, dim=-1).values.sum(-1)
    chosen = score.argsort(dim=-1, descending=True, stable=True)[..., : scores.top_groups]
    groups = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, chosen, True)
    return groups.repeat_interleave(values.shape[-1] // scores.groups, -1)


def _order(tier, values, descending):
    """Positions along the last dimension by ascending tier, then by value, then ascending."""
    by_value = values.argsort(dim=-1, descending=descending, stable=True)
    return by_value.gather(-1, tier.gather(-1, by_value).argsort(dim=-1, stable=True))


def _mean_range(values, state):
    """``[B, T]`` float32: the mean over the tokens before each of max - min of the selection values, 0 where that is
    not finite. Updates the state's sum and count."""
    tokens = values.shape[1]
    ranges = (values.amax(-1) - values.amin(-1)).double()
    ranges = torch.where(ranges.isfinite(), ranges, 0.0)
    seen = state.tokens[:, None] + torch.arange(tokens, device=values.device)
    # Summed in order in float64, so that a sequence cut anywhere gives the same bits.
    range_sum = torch.cumsum(torch.cat((state.range_sum[:, None], ranges), 1), 1)
    state.range_sum.copy_(range_sum[:, -1])
    state.tokens += tokens
    return (range_sum[:, :-1] / seen.clamp(min=1)).float()


def _before(gates, order, scores):
    """``[B, T, E]`` float32: of each expert the share of the scores that the better-ranked have."""
    if scores.function != "softmax":
        gates = gates / gates.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    before = gates.gather(-1, order).cumsum(-1).roll(1, -1)
    before[..., 0] = 0.0
    return torch.empty_like(before).scatter_(-1, order, before)


def _touch_and_place(chosen, kept, state, evict):
    """One token's residency update: touch its experts, give those absent the slots of the experts that leave.

    Args:
        chosen: ``[B, K]`` int64, highest gate weight first; touched in reverse, so that it leaves last.
        kept: ``[B, K]`` bool, those that run: the others are as if not chosen.

    Returns:
        ``[B, K]`` slots, -1 where not kept, and hits.
    """
    k = chosen.shape[1]
    slots = state.slot_of.gather(1, chosen)
    hits = (slots >= 0) & kept
    untouched = state.clock[:, None].clone()
    touched = torch.where(
        kept, untouched + torch.arange(k, 0, -1, device=chosen.device), state.last_use.gather(1, chosen)
    )
    state.last_use.scatter_(1, chosen, touched)
    state.uses.scatter_add_(1, chosen, kept.long())
    state.clock += k

    # Victims by slot: free ones, lowest first, then residents by the policy's key; never one just touched.
    expert_of, capacity = state.expert_of, state.expert_of.shape[1]
    occupant = expert_of.clamp(min=0)
    key = evict(state.last_use, state.uses).gather(1, occupant).masked_fill(expert_of < 0, 0)
    tier = (expert_of >= 0).long()
    tier[(expert_of >= 0) & (state.last_use.gather(1, occupant) > untouched)] = 2
    tier[torch.arange(capacity, device=chosen.device) >= state.capacity[:, None]] = 2
    victims = _order(tier, key, descending=False)[:, :k]
    missed = ~hits & kept
    nth_miss = (missed.cumsum(1) - 1).clamp(min=0)
    slots = torch.where(missed, victims.gather(1, nth_miss), torch.where(kept, slots, -1))

    for b, k in missed.nonzero().tolist():
        expert, slot = chosen[b, k], slots[b, k]
        if (leaving := expert_of[b, slot]) >= 0:
            state.slot_of[b, leaving] = -1
        state.slot_of[b, expert] = slot
        expert_of[b, slot] = expert
    return slots, hits
