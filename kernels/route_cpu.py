"""``route`` on the CPU: numpy over the tensors' memory, since for one token torch's overhead exceeds the work.

What does not depend on residency is computed for all tokens at once. Then the tokens are stepped: several caches side
by side; a single one, as in decode, with Python's own numbers.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from cachemoe.kernels import reference_route, route_c
from cachemoe.kernels.eviction import eviction
from cachemoe.kernels.policy import DROP, KNOBS, ORIGINAL, Policy, noise_bits
from cachemoe.kernels.state import SOFTMAX, GateScores, Misses, Routing

LARGE = 1e38  # the difference of smaller numbers is finite in float32
NEVER, FIRST = np.iinfo(np.int64).max, np.iinfo(np.int64).min
TINY, SCALE = np.finfo(np.float32).tiny, np.float32(2.0**-24)
PLACES = np.arange(512, dtype=np.float32)
INT8 = np.dtype(np.int8)
OF_WEIGHTS = frozenset(("weight", "first", "before"))


def route_cpu(
    logits: torch.Tensor,
    state,
    evict: Callable,
    top_k: int,
    policy: Policy,
    scores: GateScores,
    correction: torch.Tensor | None,
    out: Routing | None,
) -> Routing:
    """As :func:`cachemoe.kernels.reference_route.route`; the tensors of ``state`` and ``out`` are contiguous."""
    reference_route.check_slots(state, top_k)
    caches, tokens, experts = logits.shape
    if caches == 1 and is_plain(state, policy):
        routing = route_c.route(logits, state, evict, top_k, policy, scores, correction)
        if routing is not None:
            return routing if out is None else _write(out, routing)
    ranked = _rank(logits, scores, correction)
    if ranked is None:
        routing = reference_route.route(logits, state, evict, top_k, policy, scores, correction)
        return routing if out is None else _write(out, routing)

    first = state.tokens.tolist() if policy.draws else None
    *ranked, ranges = ranked
    choose, grade = _chooser(
        *ranked, first, reference_route.mean_range(ranges, state), policy, scores, top_k, _have(state)
    )
    asked, own = None, None
    if is_plain(state, policy):
        step = _step_one if caches == 1 else _step
        ids, slots, hits, *misses = step(choose, grade, state, evict, tokens, top_k)
    else:
        order = _candidates(*ranked[:3], scores)
        ids, slots, hits, *misses, asked, own = _step_pages(choose, grade, state, evict, tokens, top_k, order, policy)

    weights = ranked[-1].take(_places(ids, experts))
    if grade is not None:
        weights[slots < 0] = 0.0
    if scores.renormalise:
        if policy.renormalises or own is None:
            whole = weights
        else:
            whole = ranked[-1].take(_places(own, experts))
        weights = weights / (whole.sum(-1, keepdims=True) + np.float32(scores.epsilon))
    if scores.scale != 1:
        weights *= np.float32(scores.scale)
    *tensors, miss_pages, miss_slots, miss_count = map(torch.from_numpy, (ids, weights, slots, hits, *misses))
    routing = Routing(*tensors, Misses(miss_pages, miss_slots, miss_count))
    if state.levels > 1 or policy.swaps:
        routing.asked = torch.from_numpy(asked)
    return routing if out is None else _write(out, routing)


def _write(out: Routing, routing: Routing) -> Routing:
    for tensor, result in zip(out.tensors(), routing.tensors(), strict=True):
        tensor.copy_(result)
    if routing.asked is not None:
        out.asked.copy_(routing.asked)
    return out


def is_plain(state, policy: Policy) -> bool:
    """Whether a page is an expert, of a layer with caches of its own, and runs in its place or not at all."""
    return state.levels == state.layers == 1 and not policy.swaps and policy.renormalises


def place(
    ids: torch.Tensor, weights: torch.Tensor, state, evict: Callable, drops: torch.Tensor | None = None
) -> Routing:
    """As :func:`cachemoe.kernels.reference_route.place`; the tensors of ``state`` are contiguous."""
    caches, tokens, k = ids.shape
    if not is_plain(state, ORIGINAL):
        return reference_route.place(ids, weights, state, evict, drops)
    reference_route.check_slots(state, k)
    weights = weights.detach().float().numpy()
    order = _places((-weights).argsort(-1, kind="stable"), k)
    chosen = ids.numpy().take(order)
    if caches == 1 and drops is None:
        chosen_ids, given = torch.from_numpy(chosen), torch.from_numpy(weights.take(order))
        if (routing := route_c.place(chosen_ids, given, state, evict)) is not None:
            return routing
    levels = None if drops is None else DROP * drops.numpy().take(order)
    step = _step_one if caches == 1 else _step
    grade = None if levels is None else lambda at, *_: levels[at]
    ids, slots, hits, *misses = step(lambda at, _: chosen[at], grade, state, evict, tokens, k)
    results = ids, weights.take(order), slots, hits
    return Routing(*map(torch.from_numpy, results), Misses(*map(torch.from_numpy, misses)))


def peek(
    logits: torch.Tensor,
    state,
    top_k: int,
    policy: Policy = ORIGINAL,
    scores: GateScores = SOFTMAX,
    correction: torch.Tensor | None = None,
) -> list[int]:
    """What ``route`` would choose for one token, with nothing updated: a prediction for a layer that is still to come.

    Args:
        logits: ``[E]``.
        state: of one cache (B = 1).
        top_k, policy, scores, correction: as for ``route``.

    Returns:
        The pages of those that would run, the highest selection value first: with one level the experts.
    """
    needs_gates = correction is not None or scores.groups > 1 or "before" in policy.words
    needs_gates = needs_gates or policy.grade is not None or policy.bounded
    ranked = _rank(logits[None, None], scores, correction, needs_gates)
    if ranked is None:
        anyone = (lambda last_use, uses: last_use), top_k
        stepped = state.clone()
        routing = reference_route.route(logits[None, None], stepped, *anyone, policy, scores, correction)
        first = state.layer * state.levels * state.experts
        return (stepped.page_of[0, routing.slots[routing.slots >= 0]] - first).tolist()
    *ranked, _ = ranked
    mean_range = [[state.range_sum.item() / max(state.tokens.item(), 1)]]
    choose, grade = _chooser(*ranked, state.tokens.tolist(), mean_range, policy, scores, top_k, _have(state))
    slot_of = _own_pages(state)[0]
    chosen = choose((0, 0), slot_of)
    levels = None if grade is None else grade((0, 0), chosen, slot_of)
    if is_plain(state, policy):
        return (chosen if levels is None else chosen[_kept(levels)]).tolist()
    wanted = [0] * top_k if levels is None else levels.tolist()
    table = None if policy.table is None else policy.table[0]
    order = _candidates(*ranked[:3], scores)[0, 0]
    ran = reference_route.decide(chosen.tolist(), wanted, order, state, 0, policy.swaps, table)
    return [page for _, page, _, _ in ran if page >= 0]


def _rank(logits, scores, correction, needs_gates=True):
    """What does not depend on residency: selection values, negated, ``[B, T, E]``; experts in order of them, and where
    these stand in a flat array; gate scores if needed; the values' ranges ``[B, T]``. None where a value is not finite,
    as only a router gone astray has it: numpy would sort NaN last."""
    if logits.requires_grad:
        logits = logits.detach()
    if logits.dtype != torch.float32:
        logits = logits.float()
    gates = reference_route.gate_scores(logits, scores) if needs_gates else logits
    corrected = gates if correction is None else gates + correction.float().reshape(-1, 1, logits.shape[2])
    negated = -(logits if correction is None else corrected).numpy()
    order = negated.argsort(-1, kind="stable")
    experts = order.shape[2]
    places = _places(order, experts)
    ends = negated.take(places[..., :: max(experts - 1, 1)])  # the highest and the lowest, or the only one
    if not sum(map(abs, ends.ravel().tolist())) < LARGE:  # NaN is not, either
        return None
    if scores.top_groups < scores.groups:
        candidates = reference_route.candidates(torch.from_numpy(-negated), corrected, scores).numpy()
        negated = np.where(candidates, negated, np.float32(np.inf))
        order = negated.argsort(-1, kind="stable")
        places = _places(order, experts)
    return negated, order, places, gates.numpy(), ends[..., -1] - ends[..., 0]


def _candidates(negated, order, places, scores):
    """``[B, T, E]`` the experts in order, -1 of those that the token may not choose."""
    return order if scores.top_groups == scores.groups else np.where(np.isinf(negated.take(places)), -1, order)


def _places(ids, experts):
    """Where experts ``[B, T, ...]`` stand in a flat array of ``[B, T, E]``."""
    caches, tokens, _ = ids.shape
    if caches == tokens == 1:
        return ids
    return ids + np.arange(0, caches * tokens * experts, experts).reshape(caches, tokens, 1)


def _have(state) -> Callable[..., np.ndarray]:
    """From a layer's ``slot_of`` ``[..., V * E]`` the word ``have``, int8, of all experts or of some, ``[..., n]``."""
    if state.levels == 1:
        return lambda slot_of, some=None: ((slot_of if some is None else _take(slot_of, some)) >= 0).view(INT8)
    experts, worst_first = state.experts, range(state.levels - 1, -1, -1)

    def have(slot_of, some=None):
        if some is not None and (whole := _take(slot_of, some) >= 0).all():
            return whole.view(INT8)
        best = 0
        for v in worst_first:
            pages = (
                slot_of[..., v * experts : (v + 1) * experts] if some is None else _take(slot_of, v * experts + some)
            )
            best = np.where(pages >= 0, v + 1, best)
        return best.astype(INT8)

    return have


def _own_pages(state) -> np.ndarray:
    """``[B, V * E]``, where the pages of the layer that is routed are."""
    size = state.levels * state.experts
    return state.on_host.slot_of[:, state.layer * size : (state.layer + 1) * size]


def _chooser(negated, order, places, gates, first, mean_range, policy, scores, k, have):
    """The policy as two functions, of a token's index into ``[B, T, E]``, of one cache or of all: ``choose``, with
    ``slot_of`` ``[..., V * E]``, gives the chosen experts ``[..., K]``, the highest selection value first; ``grade``,
    with these and ``slot_of``, the level wanted of each of them, and is None where all are to run at full precision."""
    knobs = None if policy.knobs is None else policy.knobs_on_host
    table = None if policy.table is None else policy.table.numpy()
    grade = None if policy.grade is None else _grader(negated, gates, first, knobs, table, policy, k, have)
    if policy.key is None:
        return (lambda at, slot_of: order[at][..., :k]), grade
    arguments, by_token, place_of = [None] * len(policy.words), [], policy.place_of
    rank = np.empty(order.shape, np.int64)
    rank.put(places, _numbers(order.shape[2]))
    for word, place in place_of.items():
        if word in KNOBS:
            i = KNOBS.index(word)
            arguments[place] = knobs[0, i] if len(order) == 1 else knobs[:, i, None]
        elif word == "table":
            arguments[place] = table[0] if len(order) == 1 else table
        elif word == "value":
            by_token.append((place, -negated))
        elif word == "rank":
            by_token.append((place, rank.astype(np.float32)))
        elif word == "before":
            by_token.append((place, _before(gates, places, rank, scores)))
        elif word == "span":
            by_token.append((place, np.array(mean_range, np.float32)[..., None]))
        elif word == "noise":
            by_token.append((place, _noise(first, knobs, order.shape)))
    have_at, cost_at, bounded = place_of.get("have"), place_of.get("cost"), policy.bounded
    key, alone = policy.key, len(order) == 1
    if alone:
        kept = order[..., : min(int(knobs[0, 0]), k)]
    else:
        kept = rank < np.minimum(knobs[:, None, :1], k)
    closed = None if scores.top_groups == scores.groups else np.isinf(negated)  # groups not to choose from

    def choose(at, slot_of):
        for place, values in by_token:
            arguments[place] = values[at]
        if have_at is not None:
            arguments[have_at] = have(slot_of)
        if cost_at is not None:
            arguments[cost_at] = _miss_cost(knobs) * (have(slot_of) == 0)
        smallest = -key(*arguments)
        if smallest.dtype.char != "f":
            smallest = smallest.astype(np.float32)
        if closed is not None:
            smallest[closed[at]] = np.inf
        smallest[kept[at]] = -np.inf
        if alone:
            ranks = rank[at].take(smallest.argsort(kind="stable")[:k])
        else:
            ranks = _take(rank[at], smallest.argsort(-1, kind="stable")[:, :k])
        ranks.sort()
        if bounded:
            ranks = _bounded(ranks, _take(gates[at], order[at]), knobs[:, KNOBS.index("regret")])
        return order[at].take(ranks) if alone else _take(order[at], ranks)

    return choose, grade


@cache
def _numbers(count):
    return np.arange(count)


def _grader(negated, gates, first, knobs, table, policy, k, have):
    """``grade`` of ``_chooser``."""
    words = policy.grade_words
    known = {"place": PLACES[:k]}
    for i, knob in enumerate(KNOBS):
        if knob in words:
            known[knob] = knobs[0, i] if len(knobs) == 1 else knobs[:, i, None]
    seen = {}
    if "value" in words:
        seen["value"] = -negated
    if "noise" in words:
        seen["noise"] = _noise(first, knobs, gates.shape)
    weighs, sums = not OF_WEIGHTS.isdisjoint(words), "before" in words
    looks, costs = "have" in words or "cost" in words, "cost" in words

    def grade(at, chosen, slot_of):
        if weighs:
            weight = _take(gates[at], chosen)
            weight = weight / np.maximum(weight.cumsum(-1)[..., -1:], TINY)
            known["weight"], known["first"] = weight, weight[..., :1]
            if sums:
                known["before"] = before = np.zeros(weight.shape, np.float32)
                weight[..., :-1].cumsum(-1, out=before[..., 1:])
        for word in seen:
            known[word] = _take(seen[word][at], chosen)
        if "table" in words:
            known["table"] = _take(table[0] if len(table) == 1 else table, chosen)
        if looks:
            known["have"] = have(slot_of, chosen)
        if costs:
            known["cost"] = _miss_cost(knobs) * (known["have"] == 0)
        levels = np.asarray(policy.grade(*[known[word] for word in words]))
        return levels if levels.shape == chosen.shape else np.broadcast_to(levels, chosen.shape)

    return grade


def _kept(levels):
    """``[..., K]`` bool: who runs, of the levels wanted, where there is nobody to swap in."""
    return ~((levels < 0) & (PLACES[: levels.shape[-1]] > 0))


def _miss_cost(knobs):
    """Of one cache a number, of several ``[B, 1]``."""
    i = KNOBS.index("miss")
    return knobs[0, i] if len(knobs) == 1 else knobs[:, i, None]


def _noise(first, knobs, shape):
    """``[B, T, E]``: of each cache from the token that it has come to."""
    _, tokens, experts = shape
    begins = (np.array(first) * experts + (knobs[:, KNOBS.index("seed")].astype(np.int64) << 24))[:, None, None]
    return noise_bits(begins + np.arange(tokens * experts).reshape(tokens, experts)).astype(np.float32) * SCALE


def _bounded(ranks, scores, regret):
    """As in the reference: ``ranks`` ``[..., K]``, ``scores`` ``[..., E]`` by rank, ``regret`` ``[B]``."""
    if ranks.ndim > 1:
        return np.stack([_bounded(*each) for each in zip(ranks, scores, regret[:, None], strict=True)])
    row, k = ranks.tolist(), len(ranks)
    brought_in = [r for r in row if r >= k]
    left = [r for r in range(k - 1, -1, -1) if r not in row] if brought_in else []
    for new, old in zip(brought_in, left, strict=True):
        if not (0 < regret and scores[old] - scores[new] < regret):
            row[row.index(new)] = old
    return np.array(sorted(row))


def _take(values, positions):
    """Along the last dimension, for one cache or several."""
    return values.take(positions) if values.ndim == 1 else values[np.arange(len(values))[:, None], positions]


def _before(gates, places, rank, scores):
    """``[B, T, E]``: of each expert the share of the scores that the better-ranked have."""
    if scores.function != "softmax":
        gates = gates / np.maximum(gates.sum(-1, keepdims=True), np.finfo(np.float32).tiny)
    # As torch sums: in float64, each partial sum rounded.
    upto, by_rank = gates.take(places).astype(np.float64).cumsum(-1), np.zeros(gates.shape, np.float32)
    by_rank[..., 1:] = upto[..., :-1]
    return by_rank.take(_places(rank, rank.shape[2]))


def _step_pages(choose, grade, state, evict, tokens, k, order, policy):
    """Step caches of several levels, or that layers share, or whose policy swaps: as the reference does.

    Returns:
        The arrays of a ``Routing`` in order, but for the weights, and then ``asked``, and the experts chosen at first.
    """
    slot_of, alone = _own_pages(state), len(order) == 1
    ids, slots, asked, own = np.empty((4, len(order), tokens, k), np.int64)
    hits, missed, taken = np.empty(ids.shape, np.bool_), [[] for _ in order], [[] for _ in order]
    whole, levels = [_stepper_at_full(state, evict, b, k) for b in range(len(order))], None
    for t in range(tokens):
        at, seen = ((0, t), slot_of[0]) if alone else ((slice(None), t), slot_of)
        own[:, t] = chosen = choose(at, seen)
        if grade is not None:
            levels = grade(at, chosen, seen).reshape(own[:, t].shape)
        for b, experts in enumerate(own[:, t]):
            if levels is None or not levels[b].any():  # as ``decide`` and ``settle``, without looking at each place
                ids[b, t] = asked[b, t] = experts
                slots[b, t], hits[b, t] = whole[b](experts, missed[b], taken[b])
                continue
            table = None if policy.table is None else policy.table[b]
            ran = reference_route.decide(
                experts.tolist(), levels[b].tolist(), order[b, t], state, b, policy.swaps, table
            )
            placed, new = reference_route.settle(ran, state, b, evict)
            for page, slot in new:
                missed[b].append(page)
                taken[b].append(slot)
            ids[b, t], pages, asked[b, t], hits[b, t] = zip(*ran, strict=True)
            slots[b, t] = [placed.get(page, -1) for page in pages]
    filled = [[each + [-1] * (tokens * k - len(each)) for each in lists] for lists in (missed, taken)]
    pages, places = np.array(filled, np.int64)
    return ids, slots, hits, pages, places, np.array([len(each) for each in missed]), asked, own


def _stepper_at_full(state, evict, b, k):
    """What touches and places a token's K experts of the routed layer at full precision in cache ``b``: from the
    experts ``[K]`` their slots, and whether they were resident; the missing ones go to two lists, page and slot."""
    memory, experts, size = state.on_host, state.experts, state.levels * state.experts
    first, capacity = state.slots[0][0], memory.capacity.item(b)
    slot_of, page_of = memory.slot_of[b], memory.page_of[b, first : first + capacity]
    layer, page_0 = state.layer * experts, state.layer * size
    keys_now = None

    def step(chosen, missed, taken):
        nonlocal keys_now
        where = slot_of.take(chosen + page_0)
        placed, mine, clock = where.tolist(), chosen + layer, memory.clock.item(b)
        memory.last_use[b, mine] = np.arange(clock + k, clock, -1)
        memory.uses[b, mine] += 1
        if state.heavy is not None:
            memory.heavy[b, mine] += 1
        if min(placed) < 0:
            keys_now = keys_now or eviction(evict, state)
            keys = keys_now()[b].take(page_of // size * experts + page_of % experts)
            placed = [slot - first for slot in placed]
            before = len(missed)
            _give_slots(chosen.tolist(), placed, keys, page_of, slot_of, missed, taken, page_0, first)
            taken[before:] = [slot + first for slot in taken[before:]]
            placed = [slot + first for slot in placed]
        memory.clock[b] = clock + k
        return placed, where >= 0

    return step


def _give_slots(chosen, placed, keys, page_of, slot_of, missed, taken, page_0=0, first=0):
    """Give the absent experts of a token slots: free ones, lowest first, then those whose keys are smallest.

    Args:
        chosen: K experts.
        placed: their slots, below 0 where they have none; filled in.
        keys: ``[C]`` of who is in each slot; changed.
        page_of: ``[C]`` updated, as is ``slot_of``, of all pages of the cache.
        missed, taken: lists, to which the experts that had no slot and their new ones are appended.
        page_0: page of the layer's first expert.
        first: what ``slot_of`` calls slot 0.
    """
    if page_of[page_of.argmin()] < 0:
        free = (page_of < 0).nonzero()[0]
        keys[free] = FIRST + free
    for slot in placed:
        if slot >= 0:
            keys[slot] = NEVER
    for i, expert in enumerate(chosen):
        if placed[i] < 0:
            placed[i] = slot = int(keys.argmin())
            keys[slot] = NEVER
            old = page_of.item(slot)
            if old >= 0:
                slot_of[old] = -1
            slot_of[expert + page_0], page_of[slot] = slot + first, expert + page_0
            missed.append(expert)
            taken.append(slot)


def _step_one(choose, grade, state, evict, tokens, k):
    """Step one cache: choose, touch and place each token's experts.

    Returns:
        The arrays of a ``Routing`` in order, but for the weights.
    """
    memory = state.on_host
    slot_of, page_of, last_use, uses = memory.slot_of[0], memory.page_of[0], memory.last_use[0], memory.uses[0]
    capacity, clock = memory.capacity.item(), memory.clock.item()
    ids, slots = np.empty((2, 1, tokens, k), np.int64)
    hits, missed, taken = np.empty((1, tokens, k), np.bool_), [], []
    keys_now = None
    for t in range(tokens):
        ids[0, t] = chosen = choose((0, t), slot_of)
        touches = np.arange(clock + k, clock, -1)
        if grade is not None:
            kept = _kept(grade((0, t), chosen, slot_of)).nonzero()[0]
            chosen, touches = chosen[kept], touches[kept]
        where = slot_of.take(chosen)
        found, placed = where >= 0, where.tolist()
        last_use[chosen] = touches
        uses[chosen] += 1
        if min(placed) < 0:
            occupants = page_of[:capacity]
            keys_now = keys_now or eviction(evict, state)
            _give_slots(chosen.tolist(), placed, keys_now()[0].take(occupants), occupants, slot_of, missed, taken)
        if grade is None:
            slots[0, t], hits[0, t] = placed, found
        else:
            slots[0, t], hits[0, t] = -1, False
            slots[0, t, kept], hits[0, t, kept] = placed, found
        memory.clock[0] = clock = clock + k
    nothing = [-1] * (tokens * k - len(missed))
    pages, places = np.array([[missed + nothing], [taken + nothing]], np.int64)
    return ids, slots, hits, pages, places, np.array([len(missed)])


def _step(choose, grade, state, evict, tokens, k):
    """As ``_step_one`` for B caches."""
    memory = state.on_host
    slot_of, last_use, uses, clock = memory.slot_of, memory.last_use, memory.uses, memory.clock
    caches = len(slot_of)
    first = np.arange(0, slot_of.size, slot_of.shape[1])[:, None]  # of each cache in the flat arrays
    flat_slot_of, flat_last_use, flat_uses = (a.reshape(-1) for a in (slot_of, last_use, uses))
    ids, slots = np.empty((2, caches, tokens, k), np.int64)
    hits = np.empty(ids.shape, np.bool_)
    misses = (*np.full((2, caches, tokens * k), -1), np.zeros(caches, np.int64))
    places = np.arange(k, 0, -1)
    kept = slice(None)
    for t in range(tokens):
        chosen = choose((slice(None), t), slot_of)
        entries = chosen + first
        placed = flat_slot_of[entries]
        before = clock.copy()
        touches = before[:, None] + places
        ids[:, t], hits[:, t] = chosen, placed >= 0
        missing = ~hits[:, t]
        if grade is not None:
            kept = _kept(grade((slice(None), t), chosen, slot_of))
            placed[~kept] = -1
            hits[:, t] &= kept
            missing &= kept
        flat_last_use[entries[kept]] = touches[kept]
        flat_uses[entries[kept]] += 1
        if missing.any():
            _place(chosen, placed, missing, before, first, state, evict, misses)
        clock += k
        slots[:, t] = placed
    return ids, slots, hits, *misses


def _place(chosen, placed, missing, untouched, first, state, evict, misses):
    """Give absent experts the slots of those that leave.

    Args:
        chosen, placed: ``[B, K]`` experts and their slots; filled in where ``missing``.
        untouched: ``[B]`` the clock before the token.
        first: ``[B, 1]`` where each cache begins in a flat array.
    """
    memory = state.on_host
    page_of, slot_of, last_use = memory.page_of, memory.slot_of, memory.last_use
    occupants = np.maximum(page_of, 0) + first
    key = eviction(evict, state)().take(occupants)
    key[last_use.take(occupants) > untouched[:, None]] = NEVER
    slot = np.arange(page_of.shape[1])
    free = page_of < 0
    if free.any():
        key = np.where(free, FIRST + slot, key)
    key[slot >= memory.capacity[:, None]] = NEVER
    victims = key.argsort(-1, kind="stable")

    experts, places, count = misses
    nth = [0] * len(chosen)
    for b, k in np.argwhere(missing).tolist():
        expert, slot = chosen[b, k], victims[b, nth[b]]
        old = page_of[b, slot]
        if old >= 0:
            slot_of[b, old] = -1
        slot_of[b, expert] = slot
        page_of[b, slot] = expert
        placed[b, k] = slot
        experts[b, count[b]] = expert
        places[b, count[b]] = slot
        count[b] += 1
        nth[b] += 1
