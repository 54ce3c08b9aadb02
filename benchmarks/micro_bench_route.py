"""Routing one token in one layer, with half of the experts resident: too few bytes for a bound, so time alone.

The eager sequence is what a PyTorch user writes without this project: selection alone, with no residency to keep.
"""

from functools import partial

import pytest
import torch

from cachemoe.benchmarks.geometries import GEOMETRIES
from cachemoe.benchmarks.micro_figures import Subject, Work
from cachemoe.benchmarks.micro_turns import in_turns
from cachemoe.benchmarks.timing import plan_round
from cachemoe.kernels.route import route
from cachemoe.kernels.state import Residency
from cachemoe.moe.strategies import Strategy, policy_of
from cachemoe.offload.residency import least_recently_used

TOKENS = 200  # distinct tokens taken in turns
TOP_J = 2
PRIOR = 0.2
ALL_STRATEGIES = ("original", "max-rank:8", "cumsum:0.7", f"cache-prior:{PRIOR}")
STRATEGIES = {name: (f"cache-prior:{PRIOR}",) for name in GEOMETRIES} | {"qwen1.5-moe": ALL_STRATEGIES}
IMPLEMENTATIONS = ("cachemoe", "eager selection", "eager selection, compiled")


def runs():
    """(geometry, strategy, repetition, implementation), implementations innermost."""
    cases = [(geometry, strategy) for geometry, strategies in STRATEGIES.items() for strategy in strategies]
    # The baselines know no windows.
    return in_turns(cases, lambda _, strategy: IMPLEMENTATIONS[: None if strategy.startswith("cache-prior") else 1])


def eager_selection(logits, resident, mean_range, top_k: int):
    """Cache-prior selection of one token: ids and weights ``[1, K]`` from logits ``[1, E]`` and residents ``[E]``."""
    probabilities = logits.softmax(-1)
    biased = logits + PRIOR * mean_range * resident
    # Experts that are always kept come first whatever residency says.
    biased = biased.scatter(-1, logits.topk(TOP_J).indices, torch.inf)
    ids = biased.topk(top_k).indices
    return ids, probabilities.gather(-1, ids)


def half_resident(geometry, device) -> Residency:
    return Residency.empty(torch.tensor([geometry.experts // 2]), geometry.experts).to(device)


@pytest.fixture(scope="module", autouse=True)
def say_what_the_baseline_lacks(session):
    session.note("Eager selection is softmax, bias, top-k and gather alone: it keeps no residency, route does.")


@pytest.fixture(scope="module")
def compiled():
    """Compiled once for all geometries and repetitions."""
    yield torch.compile(eager_selection, fullgraph=True, dynamic=False)
    torch.compiler.reset()


@pytest.mark.parametrize(("name", "strategy", "repetition", "implementation"), runs())
def test_route(measure, device, compiled, name, strategy, repetition, implementation):
    geometry = GEOMETRIES[name]
    k = geometry.top_k
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(TOKENS, 1, 1, geometry.experts, generator=generator, device=device)
    if implementation == "cachemoe":
        state = half_resident(geometry, device)
        policy = policy_of(Strategy.parse(strategy, geometry.experts, k, TOP_J), top_k=k).to(device)
        calls = [partial(route, token, state, least_recently_used, k, policy) for token in logits]
    else:
        select = compiled if implementation.endswith("compiled") else eager_selection
        resident = torch.arange(geometry.experts, device=device) % 2 == 0
        mean_range = torch.tensor(5.0, device=device)
        calls = [partial(select, token[0], resident, mean_range, k) for token in logits]
    with torch.inference_mode():
        for call in calls if implementation == "cachemoe" else ():
            call()  # the pool fills
        timed = plan_round(calls, device, capturable=True)
        measure(Subject("route", name, 1, strategy, implementation), Work(), repetition, timed)
