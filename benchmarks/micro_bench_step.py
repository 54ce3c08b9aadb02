"""One token through one layer, captured: route, fetch what is missing or read it through, and the experts.

What the project is for: residency, misses and pages are the GPU's own affair, so that a step waits for no host. Each
step misses exactly 0, 1 or 2 experts, which the routings confirm. Beside its time stands the sum of what it moves: the
hits' weights at the memory's speed and the misses' at the link's; routing has no bound, too few bytes. What the engine
adds once a token, its counters, is left out. Without a GPU the store and the pool are both in DRAM.
"""

from functools import partial
from itertools import product
from math import ceil, gcd, lcm
from types import SimpleNamespace

import pytest
import torch

from cachemoe.benchmarks.geometries import GEOMETRIES, Geometry
from cachemoe.benchmarks.micro_figures import Subject, Work
from cachemoe.benchmarks.micro_turns import in_turns
from cachemoe.benchmarks.micro_workload import WORKING_SET, check, fill
from cachemoe.benchmarks.timing import Round, plan_round
from cachemoe.kernels.experts import experts
from cachemoe.kernels.policy import Policy
from cachemoe.kernels.route import route
from cachemoe.kernels.state import GateScores, Routing
from cachemoe.moe.strategies import CachePrior, policy_of
from cachemoe.offload.device_engine import DeviceEngine
from cachemoe.offload.residency import least_recently_used
from cachemoe.offload.store import StoreLayout

GEOMETRY = "qwen3-30b-a3b"
KINDS = ("bf16", "int4")
MISSES = (0, 1, 2)
WAYS = {"cachemoe, fetched": False, "cachemoe, read through": True}
STRATEGY, SCORES = CachePrior(0.2), GateScores(renormalise=True)
WANTED = 4.0  # added to the logits of the experts that a token wants: no resident comes before them


def wanted(experts: int, top_k: int, misses: int) -> torch.Tensor:
    """The experts of a sequence of tokens that repeats: ``[T, K]`` int64, each half of all experts taken in turns.

    Hits are of the first half, misses of the second. With slots for three quarters, least recently used, an expert of
    the first half is wanted again before it would leave, and one of the second only when it has left. So from the
    second time on every token misses ``misses``.
    """
    half, hits = experts // 2, top_k - misses
    tokens = lcm(half // gcd(half, hits), half // gcd(half, misses))
    first, second = (torch.arange(tokens * count).view(tokens, count) % half for count in (hits, misses))
    return torch.cat((first, half + second), -1)


def logits_of(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """``[T, 1, 1, E]`` float32: logits whose best are a token's ``ids`` ``[T, K]``, in an order of chance."""
    noise = torch.rand(len(ids), experts, generator=torch.Generator().manual_seed(0))
    return noise.scatter_add_(1, ids, torch.full(ids.shape, WANTED)).view(-1, 1, 1, experts)


class Steps:
    """Both ways' engines over one store of random pages, and their rounds.

    Layers take turns, as many as hold more than any cache does.

    Args:
        geometry: the layer's.
        kind: page format.
        device: where the pools are; a GPU's store is pinned.
    """

    def __init__(self, geometry: Geometry, kind: str, device: torch.device):
        self.geometry, self.device = geometry, device
        self.page_format = geometry.page_format(kind)
        size = self.page_format.page_bytes
        self._layers = range(ceil(WORKING_SET / (geometry.experts // 2 * size)))
        pages = (len(self._layers) * geometry.experts, size)
        self._memory = torch.empty(pages, dtype=torch.uint8, pin_memory=device.type == "cuda")
        fill(self.page_format.views(self._memory), self.page_format, torch.Generator().manual_seed(0))
        layout = StoreLayout("random", len(self._layers), geometry.experts, self.page_format)
        store = SimpleNamespace(layout=layout, memory=self._memory)
        capacity = [geometry.experts * 3 // 4 for _ in self._layers]
        self._engines = {
            name: DeviceEngine(store, capacity, geometry.top_k, device, through) for name, through in WAYS.items()
        }
        self._rounds: dict[tuple[str, int], tuple[Round, list[Routing]]] = {}

    def round(self, way: str, misses: int) -> tuple[Round, torch.Tensor]:
        """The round of steps that miss so often, made once, and how often each of its steps did ``[steps]`` int64.

        The rounds of one number of misses may take turns; another's unsettle them.
        """
        if (way, misses) not in self._rounds:
            self._rounds[way, misses] = self._make(self._engines[way], misses)
        timed, routings = self._rounds[way, misses]
        return timed, torch.cat([routing.misses.count for routing in routings]).cpu()

    def _make(self, engine: DeviceEngine, misses: int) -> tuple[Round, list[Routing]]:
        k, hidden = self.geometry.top_k, self.geometry.hidden
        policy = policy_of(STRATEGY, top_k=k).to(self.device)
        x = torch.randn(1, hidden, generator=torch.Generator().manual_seed(0)).bfloat16().to(self.device)
        tokens = logits_of(wanted(self.geometry.experts, k, misses), self.geometry.experts).to(self.device)
        turns = [
            (layer, logits, policy, Routing.empty(1, 1, k, self.device)) for logits in tokens for layer in self._layers
        ]
        calls = [partial(step, engine, x, *turn) for turn in turns]
        self._check(calls[0](), x, turns[0][-1])
        timed = plan_round(calls, self.device, capturable=True)
        for turn in turns * 2:  # once until every step misses as often as it will, once to note it
            choose(engine, *turn)
        engine.fill()
        return timed, [routing for *_, routing in turns]

    def _check(self, y: torch.Tensor, x: torch.Tensor, routing: Routing) -> None:
        """Whether a step of the first layer gives what the CPU computes from the store."""
        weights = self.page_format.views(self._memory[: self.geometry.experts])
        check(y, experts(x.cpu(), routing.ids[0].cpu(), routing.weights[0].cpu(), weights, self.page_format))


def choose(engine: DeviceEngine, layer: int, logits: torch.Tensor, policy: Policy, routing: Routing) -> None:
    """Route one token in one layer."""
    top_k = routing.ids.shape[-1]
    route(logits, engine.caches(layer), least_recently_used, top_k, policy, SCORES, out=routing)


def step(
    engine: DeviceEngine, x: torch.Tensor, layer: int, logits: torch.Tensor, policy: Policy, routing: Routing
) -> torch.Tensor:
    """One token through one layer, ``[1, H]``; fills the routing."""
    choose(engine, layer, logits, policy, routing)
    return engine.compute(layer, x, routing)


@pytest.mark.parametrize(("kind", "misses", "repetition", "way"), in_turns(product(KINDS, MISSES), lambda *_: WAYS))
def test_step(measure, device, one_at_a_time, kind, misses, repetition, way):
    geometry = GEOMETRIES[GEOMETRY]
    with torch.inference_mode():
        steps = one_at_a_time(kind, partial(Steps, geometry, kind, device))
        timed, _ = steps.round(way, misses)
        size = steps.page_format.weight_bytes
        over_link = misses * size if device.type == "cuda" else 0
        work = Work(geometry.top_k * size - over_link, missed=over_link)
        variant = f"{kind}, {misses} {'miss' if misses == 1 else 'misses'}"
        measure(Subject("step", GEOMETRY, 1, variant, way), work, repetition, timed)
        _, counts = steps.round(way, misses)
    assert counts.eq(misses).all(), f"steps that should miss {misses} missed {counts.unique().tolist()}"
