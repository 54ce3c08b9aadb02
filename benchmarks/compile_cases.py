"""Every launch that the kernels' heuristics choose for the geometries measured here, as data and without memory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

from cachemoe.benchmarks.geometries import GEOMETRIES, Geometry
from cachemoe.kernels.experts_decode import plan_decode
from cachemoe.kernels.experts_prefill import plan_prefill
from cachemoe.kernels.fetch_gpu import plan_fetch
from cachemoe.kernels.formats import ACTIVATIONS, GROUPED, GROUPS, PageFormat
from cachemoe.kernels.launch import Launch
from cachemoe.kernels.policy import KNOBS, ORIGINAL, Policy
from cachemoe.kernels.route_gpu import plan_route
from cachemoe.kernels.state import SOFTMAX, GateScores, Residency, Routing
from cachemoe.moe.policies import RULES
from cachemoe.offload.residency import EVICTION_POLICIES

PREFILL_TOKENS = (128, 512, 2048)
PAPERS_OWN = ("original", "max-rank", "cumsum", "cache-prior")


@dataclass(frozen=True)
class Router:
    """How many experts one layer has, and how it chooses among them."""

    experts: int
    top_k: int
    scores: GateScores = SOFTMAX
    corrected: bool = False


DEEPSEEK_V3 = GateScores("sigmoid", 8, 4, "best-two", renormalise=True, epsilon=1e-20, scale=2.5)
ROUTERS = {
    "Qwen1.5-MoE": Router(60, 4),
    "OLMoE": Router(64, 8),
    "Qwen3-30B-A3B": Router(128, 8, GateScores(renormalise=True)),
    "Mixtral": Router(8, 2, GateScores(renormalise=True)),
    "DeepSeek-V2": Router(160, 6, GateScores(groups=8, top_groups=3, scale=16.0)),
    "DeepSeek-V3": Router(256, 8, DEEPSEEK_V3, corrected=True),
    "512 experts": Router(512, 16, GateScores("relu")),
}


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _formats(geometry: Geometry) -> Iterator[tuple[str, PageFormat, torch.dtype]]:
    """(name, page format, dtype of the tokens): the kinds that kernels read."""
    for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("int8", torch.bfloat16)):
        yield kind, geometry.page_format(kind), dtype
    yield "bf16 for float32", geometry.page_format("bf16"), torch.float32
    for kind, group in product(GROUPED, GROUPS):
        if geometry.hidden % group == 0 and geometry.intermediate % group == 0:
            yield f"{kind} {group}", replace(geometry.page_format(kind), group=group), torch.bfloat16


def experts_arguments(geometry: Geometry, page_format: PageFormat, dtype: torch.dtype, tokens: int) -> tuple:
    """What ``plan_decode`` needs, without memory, and ``plan_prefill`` before its results of pairs."""
    weights = page_format.views(_empty(geometry.experts, page_format.page_bytes, dtype=torch.uint8))
    pairs = (tokens, geometry.top_k)
    x, out = (_empty(tokens, geometry.hidden, dtype=dtype) for _ in range(2))
    slots, gates = _empty(*pairs, dtype=torch.int64), _empty(*pairs, dtype=torch.float32)
    h = _empty(tokens * geometry.top_k, geometry.intermediate, dtype=dtype)
    return x, slots, gates, weights, page_format, out, h


def pair_results(geometry: Geometry, tokens: int) -> torch.Tensor:
    """``[T, K, H]`` float32 without memory."""
    return _empty(tokens, geometry.top_k, geometry.hidden, dtype=torch.float32)


def _experts(geometry: Geometry) -> Iterator[tuple[str, Launch]]:
    for kind, page_format, dtype in _formats(geometry):
        for tokens in (1, *PREFILL_TOKENS):
            arguments = experts_arguments(geometry, page_format, dtype, tokens)
            slots, weights, results = arguments[1], arguments[3], pair_results(geometry, tokens)
            pending = _empty(*slots.shape, dtype=torch.bool)
            if tokens > 1:
                for launch in plan_prefill(*arguments, results):
                    yield f"{kind}, T = {tokens}", launch
                continue
            ways = {
                "": {},
                ", hits first": {"pending": pending, "partial": results, "finish": False},
                ", misses later": {"pending": pending, "partial": results},
                ", read through": {"source": slots, "source_weights": weights},
            }
            for way, more in ways.items():
                for launch in plan_decode(*arguments, **more):
                    yield f"{kind}, T = 1{way}", launch


def _activations(geometry: Geometry) -> Iterator[tuple[str, Launch]]:
    """The launches that compute those activations that no geometry has: each format's, of one token and of many."""
    present = {each.page_format("bf16").activation for each in GEOMETRIES.values()}
    for activation in ACTIVATIONS:
        if activation in present:
            continue
        for kind, page_format, dtype in _formats(replace(geometry, options=(("activation", activation),))):
            one, many = (experts_arguments(geometry, page_format, dtype, tokens) for tokens in (1, PREFILL_TOKENS[1]))
            yield f"{activation}, {kind}, T = 1", plan_decode(*one)[0]
            results = pair_results(geometry, PREFILL_TOKENS[1])
            yield f"{activation}, {kind}, T = {PREFILL_TOKENS[1]}", plan_prefill(*many, results)[0]


LEVELED = (60, 256, 512)  # experts of the routers that are compiled with levels: few, grouped, and most


def _route(router: Router) -> Iterator[tuple[str, Launch]]:
    """Many tokens by every strategy, one by the paper's; from hidden states, which makes no other choice, by two."""
    experts, knobs = router.experts, _empty(1, len(KNOBS), dtype=torch.float32)
    # Rules without functions of their own are the original's policy.
    ruled = {name: rule for name, rule in RULES.items() if rule.key or rule.grade}
    policies = {"original": (ORIGINAL, RULES["original"])}
    for name, rule in ruled.items():
        table = rule.table and _empty(1, experts, dtype=torch.float32)
        functions = rule.key, rule.grade, False, knobs, table, rule.swaps, rule.renormalises
        policies[name] = Policy(*functions), rule
    prior = RULES["cache-prior"]
    policies["cache-prior, bounded"] = Policy(prior.key, None, True, knobs), prior
    correction = _empty(experts, dtype=torch.float32) if router.corrected else None
    # Eviction policies differ in a key alone: the others are compiled with one routing.
    ways = [("lru", strategy) for strategy in policies]
    ways += [(eviction, "cache-prior") for eviction in EVICTION_POLICIES if eviction != "lru"]
    for eviction, strategy in ways:
        (policy, rule), evict = policies[strategy], EVICTION_POLICIES[eviction]
        if rule.cheaper and experts not in LEVELED:
            continue
        top_k = rule.places(None, router.top_k, experts) if rule.places else router.top_k
        half = max(experts // 2, top_k)
        state = Residency.empty(torch.full((1,), half), experts, [half] * rule.cheaper).to("meta")
        for tokens in (1, 512) if strategy in PAPERS_OWN else (512,):
            logits, out = _empty(1, tokens, experts), Routing.empty(1, tokens, top_k, "meta")
            out.asked = torch.empty_like(out.ids) if rule.cheaper or rule.swaps else None
            arguments = (logits, state, evict, top_k, policy, router.scores, correction, out)
            yield f"{strategy}, {eviction}, T = {tokens}", plan_route(*arguments)
            if tokens == 1 and strategy in ("original", "cache-prior"):
                hidden, weight = _empty(1, 1, 2048), _empty(experts, 2048)
                gate = (hidden, weight, _empty(1, dtype=torch.int32))
                yield f"{strategy}, {eviction}, gate fused", plan_route(*arguments, gate)


def _fetch() -> Iterator[tuple[str, Launch]]:
    pool = _empty(64, 1 << 20, dtype=torch.uint8)
    pages = _empty(8, dtype=torch.int64)
    yield "any page", plan_fetch(pool, pool, pages, pages, pages[:1])


def cases() -> Iterator[tuple[str, Launch]]:
    """(what it is for, launch); geometries share many compilations."""
    for geometry in GEOMETRIES.values():
        yield from ((f"{geometry.title}, {what}", launch) for what, launch in _experts(geometry))
    yield from _activations(GEOMETRIES["olmoe"])
    for name, router in ROUTERS.items():
        yield from ((f"{name}, {what}", launch) for what, launch in _route(router))
    yield from _fetch()
