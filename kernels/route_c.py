"""``route`` and ``place`` for one plain cache on the CPU, in C: between the experts' matrices the caches are cold, and
numpy's many small calls take three to five times as long there as by themselves."""

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

from cachemoe.kernels.compile_c import compile_c, why_not
from cachemoe.kernels.expressions import program_of
from cachemoe.kernels.policy import KEY_WORDS, ORIGINAL, Policy, words_of
from cachemoe.kernels.reference_route import gate_scores
from cachemoe.kernels.state import SOFTMAX, GateScores, Misses, Routing

_SOURCE = Path(__file__).with_name("route_cpu.c")
FLAGS = ("-ffp-contract=off",)  # a product and a sum round twice, as in numpy
MOST = 1024  # experts, or slots
MOST_CHOSEN = 128  # experts of a token: numpy sums more in another order
SEEN = "last_use", "uses", "clock"  # of ``EVICT_WORDS``
_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class _Step(ctypes.Structure):
    _fields_ = (("code", _INT), ("place", _INT), ("number", ctypes.c_double), ("whole", _LONG))


class _Use(ctypes.Structure):
    _fields_ = (("place", _LONG), ("expert", _LONG), ("weight", _FLOAT))


class _Cache(ctypes.Structure):
    _fields_ = tuple(
        (name, _POINTER)
        for name in ("slot_of", "page_of", "capacity", "last_use", "uses", "clock", "tokens", "range_sum")
    )


class _Rule(ctypes.Structure):
    _fields_ = (
        *(("key", ctypes.POINTER(_Step)), ("evict", ctypes.POINTER(_Step))),
        *((name, _LONG) for name in ("key_steps", "evict_steps", "experts", "k")),
        *((name, _POINTER) for name in ("knobs", "table", "correction")),
        *(("epsilon", _FLOAT), ("scale", _FLOAT)),
        *((name, _INT) for name in ("renormalise", "needs_rank", "needs_before", "needs_noise", "by_weight")),
    )


def route(
    logits: torch.Tensor,
    state,
    evict: Callable,
    top_k: int,
    policy: Policy,
    scores: GateScores,
    correction: torch.Tensor | None,
) -> Routing | None:
    """As :func:`cachemoe.kernels.route_cpu.route_cpu`, to the bit, or of several sequences as
    :func:`cachemoe.kernels.route_batch.route_batch`; None where those are to route, and nothing is done.

    Args:
        logits: ``[1, T, E]``, or ``[N, T, E]`` of N sequences that share the cache.
        state: of one plain cache.
    """
    sequences, steps, experts = logits.shape
    rule = rule_of(policy, evict, experts, top_k, scores, correction)
    if rule is None:
        return None
    logits = logits.detach().float().contiguous()
    gates, routing = gate_scores(logits, scores), _empty(sequences * steps, top_k)
    pointers = (each.data_ptr() for each in (logits, gates, *routing.tensors()))
    if sequences == 1:
        finite = library().route(rule, cache_of(state), steps, *pointers)
    else:
        room = (_Use * (sequences * top_k))(), (ctypes.c_double * sequences)()
        finite = library().route_batch(rule, cache_of(state), sequences, steps, *pointers, *room)
    return routing if finite else None


def place(ids: torch.Tensor, weights: torch.Tensor, state, evict: Callable) -> Routing | None:
    """As :func:`cachemoe.kernels.route_cpu.place`, or of several sequences as
    :func:`cachemoe.kernels.route_batch.place_batch`, without drops.

    Args:
        ids: ``[1, T, K]``, or ``[N, T, K]``, int64 contiguous, each token's in the order of the weights.
        weights: likewise, float32 contiguous.
        state: of one plain cache.
    """
    sequences, steps, k = ids.shape
    rule = rule_of(ORIGINAL, evict, state.experts, k, SOFTMAX, None)
    if rule is None:
        return None
    routing = _empty(sequences * steps, k)
    routing.ids, routing.weights = (each.flatten(0, 1)[None] for each in (ids, weights))
    ids_at, weights_at, *results = (each.data_ptr() for each in routing.tensors())
    if sequences == 1:
        library().place(rule, cache_of(state), steps, ids_at, *results)
    else:
        room = (_Use * (sequences * k))()
        library().place_batch(rule, cache_of(state), sequences, steps, ids_at, weights_at, *results, room)
    return routing


@cache
def has_c() -> bool:
    """Whether the C could be compiled."""
    return why_not(library) is None


def _empty(tokens: int, k: int) -> Routing:
    """A routing of one cache to be filled in, with no misses."""
    ids, slots = torch.empty(2, 1, tokens, k, dtype=torch.int64, device="cpu").unbind(0)
    pages, places = torch.full((2, 1, tokens * k), -1, dtype=torch.int64, device="cpu").unbind(0)
    weights = torch.empty(1, tokens, k, dtype=torch.float32, device="cpu")
    hits = torch.empty(1, tokens, k, dtype=torch.bool, device="cpu")
    return Routing(ids, weights, slots, hits, Misses(pages, places, torch.zeros(1, dtype=torch.int64, device="cpu")))


@lru_cache(maxsize=256)
def rule_of(
    policy: Policy,
    evict: Callable,
    experts: int,
    k: int,
    scores: GateScores,
    correction: torch.Tensor | None,
    by_weight: bool = False,
) -> _Rule | None:
    """What the C has to know of them; None where it is not to route.

    Args:
        by_weight: whether a token's experts are put in the order of their weights, as ``place`` does.
    """
    plain = policy.grade is None and not policy.bounded and scores.top_groups == scores.groups
    if not plain or experts > MOST or k > MOST_CHOSEN or not has_c():
        return None
    if "before" in policy.words and scores.function != "softmax":  # which numpy makes shares first
        return None
    words = words_of(evict)
    program = program_of(evict, SEEN, True) if set(words) <= set(SEEN) else None
    key = None if policy.key is None else program_of(policy.key, KEY_WORDS, False)
    if program is None or (key is None) != (policy.key is None):
        return None
    table, knobs = (None if each is None else each.data_ptr() for each in (policy.table, policy.knobs))
    added = None if correction is None else correction.float().contiguous()
    made = _Rule(
        *(key and _steps(key), _steps(program), len(key or ()), len(program), experts, k),
        *(knobs, table, None if added is None else added.data_ptr(), scores.epsilon, scores.scale),
        *(scores.renormalise, not {"rank", "before"}.isdisjoint(policy.words)),
        *("before" in policy.words, "noise" in policy.words, by_weight),
    )
    made.kept = policy, added, key, program  # whose memory it points to
    return made


def _steps(program):
    return (_Step * len(program))(*((code, int(n) if code == 0 else 0, n, int(n)) for code, n in program))


_CACHES: WeakKeyDictionary = WeakKeyDictionary()


def cache_of(state) -> _Cache:
    """Where the state's tensors are: they stay there while it lives."""
    if (found := _CACHES.get(state)) is None:
        found = _CACHES[state] = _Cache(*(getattr(state, name).data_ptr() for name, _ in _Cache._fields_))
    return found


@cache
def library() -> ctypes.CDLL:
    compiled = compile_c(_SOURCE, FLAGS)
    rule, where = ctypes.POINTER(_Rule), ctypes.POINTER(_Cache)
    compiled.route.argtypes = rule, where, _LONG, *(_POINTER,) * 9
    compiled.route.restype = ctypes.c_int
    compiled.place.argtypes = rule, where, _LONG, *(_POINTER,) * 6
    compiled.place.restype = None
    uses = ctypes.POINTER(_Use)
    ranges = ctypes.POINTER(ctypes.c_double)
    compiled.route_batch.argtypes = rule, where, _LONG, _LONG, *(_POINTER,) * 9, uses, ranges
    compiled.route_batch.restype = ctypes.c_int
    compiled.place_batch.argtypes = rule, where, _LONG, _LONG, *(_POINTER,) * 7, uses
    compiled.place_batch.restype = None
    return compiled
