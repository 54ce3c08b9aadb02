"""The experts with the tiles that the heuristics choose and with others; on a GPU only.

For one token each launch by itself, with the neighbours of its tiles; for a prompt all launches together.
"""

from functools import partial

import pytest
import torch

from cachemoe.benchmarks.micro_figures import Subject, Work
from cachemoe.benchmarks.micro_turns import REPETITIONS, in_turns
from cachemoe.benchmarks.micro_workload import Case, Workload
from cachemoe.benchmarks.tiles import (
    LAUNCHES,
    PREFILL_TRIED,
    PROMPT,
    PROMPTS,
    TRIED,
    meta_launches,
    prefill_title,
    retiled,
    tiles_of,
    title,
)
from cachemoe.benchmarks.timing import plan_round
from cachemoe.kernels.experts_decode import plan_decode
from cachemoe.kernels.experts_prefill import plan_prefill

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def runs():
    """(geometry, kind, launch, repetition, tiles): all tiles of a launch once, then all again."""
    places = {
        (*tried, name): range(len(retiled(launch))) for tried in TRIED for name, launch in meta_launches(*tried).items()
    }
    return in_turns(places, lambda *case: places[case])


class Trial:
    """One launch of one workload with each of its tiles.

    Attributes:
        bytes: of weights that the launch reads.
        launches: ``[tiles][call]``; calls read other slots each.
        rounds: by place in ``launches``, once they are made.
    """

    def __init__(self, geometry: str, kind: str, name: str, device: torch.device):
        workload = Workload(Case(geometry, kind, 1), device)
        page_format, planned = workload.page_format, []
        for x, slots, gates in workload.calls:
            out, h = torch.empty_like(x), x.new_empty(slots.numel(), page_format.intermediate)
            both = plan_decode(x, slots, gates, workload.weights, page_format, out, h)
            both[0].run()  # what ``down`` reads
            planned.append(retiled(both[LAUNCHES.index(name)]))
        self.launches = list(zip(*planned, strict=True))
        parts = [size for part, _, size, *_ in page_format.parts if part.startswith(name)]
        self.bytes = sum(parts) * workload.geometry.top_k
        self.rounds = {}


def outputs(launch) -> torch.Tensor:
    """What a launch writes, from NaN."""
    out = launch.arguments["h_ptr" if "I" in launch.arguments else "y_ptr"]
    out.fill_(float("nan"))
    launch.run()
    return out.clone()


def assert_same(y: torch.Tensor, expected: torch.Tensor) -> None:
    """But for the order of the sums."""
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize(("geometry", "kind", "name", "repetition", "place"), runs())
def test_tiles(measure, device, one_at_a_time, geometry, kind, name, repetition, place):
    trial = one_at_a_time((geometry, kind, name), partial(Trial, geometry, kind, name, device))
    calls = trial.launches[place]
    if place not in trial.rounds:
        assert_same(outputs(calls[0]), outputs(trial.launches[0][0]))
        trial.rounds[place] = plan_round([call.run for call in calls], device, capturable=True)
    tiles = title(tiles_of(calls[0]))
    subject = Subject("tiles", geometry, 1, f"{kind} {name}", tiles if place else f"{tiles}, chosen")
    measure(subject, Work(trial.bytes), repetition, trial.rounds[place])


def prefill(workload: Workload, tiles, x, slots, gates) -> torch.Tensor:
    """What ``experts`` does for many tokens, with these tiles."""
    out, h = torch.empty_like(x), x.new_empty(slots.numel(), workload.geometry.intermediate)
    pairs = x.new_empty(*slots.shape, x.shape[1], dtype=torch.float32)
    weights, page_format = workload.weights, workload.page_format
    for launch in plan_prefill(x, slots, gates, weights, page_format, out, h, pairs, tiles=tiles):
        launch.run()
    return out


@pytest.mark.parametrize("place", range(1 + len(PREFILL_TRIED)))
@pytest.mark.parametrize("repetition", REPETITIONS)
@pytest.mark.parametrize("geometry", PROMPTS)
def test_prefill_tiles(measure, device, one_at_a_time, geometry, repetition, place):
    workload, rounds = one_at_a_time(geometry, lambda: (Workload(Case(geometry, "bf16", PROMPT), device), {}))
    tiles = PREFILL_TRIED[place - 1] if place else ()
    if place not in rounds:
        assert_same(prefill(workload, tiles, *workload.calls[0]), prefill(workload, (), *workload.calls[0]))
        calls = [partial(prefill, workload, tiles, *call) for call in workload.calls]
        rounds[place] = plan_round(calls, device, capturable=True)
    subject = Subject("tiles", geometry, PROMPT, "bf16", prefill_title(tiles) if place else "chosen")
    measure(subject, Work(workload.bytes(), workload.flops()), repetition, rounds[place])
