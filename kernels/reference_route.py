"""Routing in plain PyTorch: the specification that numpy and the kernel are held to, bit by bit where integers are.

Shapes: B caches stepped side by side (configurations of an experiment; 1 in inference), T tokens, E experts, K used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from cachemoe.kernels.eviction import eviction
from cachemoe.kernels.policy import DROP, KNOBS, ORIGINAL, SWAP, Policy, noise_bits
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
        evict: eviction policy, some of ``EVICT_WORDS`` -> int64 keys; of a level's residents that the token does not
            need the smallest leaves, the lower slot among equals.
        top_k: K, the places that a policy may drop experts from.
        policy: see ``Policy``.
        scores: how the model scores and groups its experts.
        correction: ``[E]`` or ``[B, E]`` float32 that only the selection sees (DeepSeek-V3).

    Returns:
        The ``Routing``. Misses take the free slots, lowest first, then the evicted ones, by descending gate weight.

    Raises:
        ValueError: if a level has less than K slots, since a slot needed by the same token is never a victim; or if
            ``scores`` does not fit E and K.
    """
    caches, tokens, experts = logits.shape
    scores.check(experts, top_k)
    check_slots(state, top_k)
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
            words["have"] = have = _have(state)
            words["cost"] = torch.where(have > 0, 0.0, policy.knobs[:, KNOBS.index("miss"), None])
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
        own[:, t] = chosen
        return chosen, _levels(policy, chosen, gates[:, t], words)

    out = Routing.empty(caches, tokens, top_k, logits.device)
    own = torch.empty_like(out.ids)
    _step(choose, state, evict, out, order.masked_fill(~allowed.gather(-1, order), -1), policy)
    ran = gates.gather(-1, out.ids).masked_fill(out.slots < 0, 0.0)
    whole = ran if policy.renormalises else gates.gather(-1, own)
    out.weights.copy_(gate_weights(ran, scores, whole))
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
    gates = gates.gather(-1, ids)
    return ids, gate_weights(gates, scores, gates)


def gate_weights(gates: torch.Tensor, scores: GateScores, whole: torch.Tensor) -> torch.Tensor:
    """Of the scores ``[..., K]`` of the experts that run, 0 where dropped, as shares of those of ``whole``."""
    if scores.renormalise:
        gates = gates / (whole.sum(-1, keepdim=True) + scores.epsilon)
    return gates * scores.scale


def _words_of_tokens(policy, values, gates, order, rank, scores, state):
    """``[B, T, E]`` by name: of what a policy can see that which does not depend on who is resident."""
    _, tokens, experts = values.shape
    first, ranges = state.tokens.clone(), (values.amax(-1) - values.amin(-1)).double()
    means = mean_range(torch.where(ranges.isfinite(), ranges, 0.0).numpy(), state)
    span = torch.from_numpy(np.array(means, np.float32))
    if policy.knobs is None:
        return {}
    seen = {"value": values, "rank": rank.float(), "span": span[..., None]}
    for knob in "ab":
        seen[knob] = policy.knobs[:, None, KNOBS.index(knob), None].expand(-1, tokens, -1)
    if policy.table is not None:
        seen["table"] = policy.table[:, None].expand(-1, tokens, -1)
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


def _have(state):
    """``[B, E]`` int32 of the layer that is routed: 0 where an expert is absent, else 1 + the best level resident."""
    first, size = state.layer * state.levels * state.experts, state.levels * state.experts
    resident = state.resident()[:, first : first + size].unflatten(1, (state.levels, -1))
    return torch.where(resident.any(1), resident.int().argmax(1) + 1, 0).int()


def _levels(policy, chosen, gates, words):
    """``[B, K]``: what the policy wants of each of the chosen."""
    if policy.grade is None:
        return torch.zeros_like(chosen)
    place = torch.arange(chosen.shape[1], device=chosen.device)
    weight = gates.gather(1, chosen)
    # Summed place by place in float32, whatever the device.
    weight = weight / _running(weight)[:, -1:].clamp(min=torch.finfo(torch.float32).tiny)
    before = torch.cat((torch.zeros_like(weight[:, :1]), _running(weight)[:, :-1]), 1)
    seen = {"weight": weight, "first": weight[:, :1], "before": before, "place": place.float().expand_as(weight)}
    seen |= {"a": words["a"], "b": words["b"]}
    for name in ("value", "have", "cost", "noise", "table"):
        if name in words:
            seen[name] = words[name].gather(1, chosen)
    return policy.grade(*(seen[word] for word in policy.grade_words)).expand(chosen.shape)


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
    check_slots(state, top_k)
    order = weights.argsort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    out = Routing.empty(caches, tokens, top_k, ids.device)
    weights = weights.gather(-1, order)
    levels = torch.zeros_like(ids) if drops is None else DROP * drops.gather(-1, order).long()
    _step(lambda t: (ids[:, t], levels[:, t]), state, evict, out, ids, ORIGINAL)
    out.weights.copy_(weights)
    return out


def _step(choose: Callable, state, evict: Callable, out: Routing, order: torch.Tensor, policy: Policy) -> None:
    """Touch and place token after token what ``choose(t)`` says then, ``[B, K]`` experts and the levels wanted of them;
    fills ``out`` but for the weights.

    Args:
        order: ``[B, T, E]`` experts, the best first; -1 of those that the token may not choose.
    """
    caches, tokens, _ = out.ids.shape
    if state.levels > 1 or policy.swaps:
        out.asked = torch.empty_like(out.ids)
    missed = [[] for _ in range(caches)]
    for t in range(tokens):
        chosen, levels = choose(t)
        for b in range(caches):
            table = None if policy.table is None else policy.table[b]
            ran = decide(chosen[b].tolist(), levels[b].tolist(), order[b, t], state, b, policy.swaps, table)
            placed, new = settle(ran, state, b, evict)
            missed[b] += new
            for k, (e, page, asked, hit) in enumerate(ran):
                out.ids[b, t, k], out.slots[b, t, k], out.hits[b, t, k] = e, placed.get(page, -1), hit
                if out.asked is not None:
                    out.asked[b, t, k] = asked
    for b, pairs in enumerate(missed):
        out.misses.count[b] = len(pairs)
        listed = torch.tensor([*pairs, *[(-1, -1)] * (out.misses.pages.shape[1] - len(pairs))], dtype=torch.int64)
        out.misses.pages[b], out.misses.slots[b] = listed.view(-1, 2).T


def check_slots(state, top_k: int) -> None:
    """Whether each level has slots for what one token may ask.

    Raises:
        ValueError: if not.
    """
    if (least := min(state.fewest, *state.on_host.capacity.tolist())) < top_k:
        raise ValueError(f"{least} slots cannot hold the {top_k} experts of one token")


def decide(chosen, levels, order, state, b: int, swaps: bool, table) -> list[tuple[int, int, int, bool]]:
    """What runs in each place of a token in cache ``b``.

    Args:
        chosen: K experts, the best first.
        levels: what the policy wants of them; below 0 a place is dropped or swapped, but the first, which is full; a
            level that there is not is the cheapest that there is.
        order: experts, the best first, who may stand in for others.
        table: ``[E]``, who is like whom, where the policy swaps.

    Returns:
        Of each place the expert, its page, -1 where dropped, the page asked for, and whether the page is resident.
    """
    experts, count = state.experts, state.levels
    slot_of = state.slot_of[b, state.layer * count * experts :][: count * experts].tolist()
    table = None if table is None else table.tolist()

    def best(e: int, worst: int) -> int | None:
        return next((page for page in range(e, (worst + 1) * experts, experts) if slot_of[page] >= 0), None)

    ran, used = [], set(chosen)
    for place, (e, wanted) in enumerate(zip(chosen, levels, strict=True)):
        if place == 0 and wanted < 0:
            wanted = 0
        if wanted < 0 and not (swaps and wanted <= SWAP):
            ran.append((e, -1, -1, False))
            continue
        level = int(min(wanted, count - 1)) if wanted > 0 else 0  # and of NaN
        asked, worst = level * experts + e, count - 1 if wanted < 0 else level
        page = best(e, worst)
        if page is None and wanted < 0:
            likes = (o for o in order.tolist() if o >= 0 and o not in used and table[o] == table[e])
            mates = ((o, page) for o in likes if (page := best(o, count - 1)) is not None)
            e, page = next(mates, (e, None))
            used.add(e)
        ran.append((e, asked if page is None else page, asked, page is not None))
    return ran


def settle(ran, state, b: int, evict: Callable) -> tuple[dict[int, int], list[tuple[int, int]]]:
    """A token's residency update in cache ``b``: touch the experts that run, give absent pages the slots of those that
    leave.

    Args:
        ran: as ``decide`` gives it; touched in reverse, so that the best leaves last.

    Returns:
        The slot of each page that runs; and of the missing ones, in order, page and slot.
    """
    k, experts = len(ran), state.experts
    first_expert, first_page = state.layer * experts, state.layer * experts * state.levels
    memory = state.on_host
    slot_of, page_of = memory.slot_of[b], memory.page_of[b]
    clock, touched = int(memory.clock[b]), [(place, e, page) for place, (e, page, _, _) in enumerate(ran) if page >= 0]
    of_cache = [first_expert + e for _, e, _ in touched]
    # An expert may run at two levels, for sequences of a batch: it is touched twice, and by the better place last.
    memory.last_use[b, of_cache[::-1]] = [clock + k - place for place, _, _ in reversed(touched)]
    np.add.at(memory.uses[b], of_cache, 1)
    if state.heavy is not None:
        np.add.at(memory.heavy[b], of_cache, [page < experts for _, _, page in touched])
    placed = {page: int(slot_of[first_page + page]) for _, page, _, hit in ran if hit}
    missed = []
    if absent := [page for _, page, _, hit in ran if page >= 0 and not hit]:
        keys, levels = eviction(evict, state)()[b], {}
        for page in absent:
            if (level := page // experts) not in levels:
                levels[level] = _leaving(state, b, level, keys)
            # Free slots, lowest first, then residents by the policy's key; never one that the token needs.
            in_use = set(placed.values())
            slot = next(slot for slot in levels[level] if slot not in in_use)
            if page_of[slot] >= 0:
                slot_of[page_of[slot]] = -1
            slot_of[first_page + page], page_of[slot], placed[page] = slot, first_page + page, slot
            missed.append((page, slot))
    memory.clock[b] += k
    return placed, missed


def _leaving(state, b: int, level: int, keys) -> list[int]:
    """The slots of a level in cache ``b``, those first that are to be given up first.

    Args:
        keys: ``[N]`` of the cache's experts.
    """
    experts, size = state.experts, state.experts * state.levels
    first, end = state.slots[level]
    if level == 0:
        end = min(end, first + int(state.capacity[b]))
    held = state.on_host.page_of[b, first:end]
    worth = keys[held // size * experts + held % experts]
    order = np.lexsort((np.arange(len(held)), worth, held >= 0))
    free = np.flatnonzero(held < 0)
    return (first + np.concatenate((free, order[len(free) :]))).tolist()


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


def mean_range(ranges: np.ndarray, state) -> Sequence[Sequence[float]] | np.ndarray:
    """``[B, T]`` float64: the mean range over the tokens before each. Adds ``ranges`` ``[B, T]`` to the state.

    Summed in order in float64, so that a sequence cut anywhere gives the same bits.
    """
    seen, range_sum = state.on_host.tokens, state.on_host.range_sum
    if len(ranges) == 1:
        means, past, total = [], seen.item(), range_sum.item()
        for added in ranges[0].tolist():
            means.append(total / max(past, 1))
            past, total = past + 1, total + added
        seen[0], range_sum[0] = past, total
        return [means]
    tokens = ranges.shape[1]
    past = np.maximum(seen[:, None] + np.arange(tokens), 1)
    sums = np.concatenate((range_sum[:, None], ranges), 1).cumsum(1)
    range_sum[:] = sums[:, -1]
    seen += tokens
    return sums[:, :-1] / past


def _before(gates, order, scores):
    """``[B, T, E]`` float32: of each expert the share of the scores that the better-ranked have."""
    if scores.function != "softmax":
        gates = gates / gates.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    before = gates.gather(-1, order).cumsum(-1).roll(1, -1)
    before[..., 0] = 0.0
    return torch.empty_like(before).scatter_(-1, order, before)
