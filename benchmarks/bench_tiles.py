"""Each launch of the experts of one token, with the heuristics' tiles and with their neighbours; on a GPU only."""

from functools import partial

import pytest
import torch

from cachemoe.benchmarks.micro import Subject, Work
from cachemoe.benchmarks.tiles import LAUNCHES, TRIED, meta_launches, retiled, tiles_of, title
from cachemoe.benchmarks.timing import plan_round
from cachemoe.benchmarks.workload import Case, Workload
from cachemoe.kernels.experts_decode import plan_decode

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

REPETITIONS = range(3)


def runs():
    """(geometry, kind, launch, repetition, tiles): all tiles of a launch once, then all again."""
    return [
        pytest.param(geometry, kind, name, repetition, place, id=f"{geometry}-{kind}-{name}-{repetition}-{place}")
        for geometry, kind in TRIED
        for name, launch in meta_launches(geometry, kind).items()
        for repetition in REPETITIONS
        for place, _ in enumerate(retiled(launch))
    ]


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


@pytest.mark.parametrize(("geometry", "kind", "name", "repetition", "place"), runs())
def test_tiles(measure, device, one_at_a_time, geometry, kind, name, repetition, place):
    trial = one_at_a_time((geometry, kind, name), partial(Trial, geometry, kind, name, device))
    calls = trial.launches[place]
    if place not in trial.rounds:
        expected, y = outputs(trial.launches[0][0]), outputs(calls[0])  # the order of sums is another
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
        trial.rounds[place] = plan_round([call.run for call in calls], device, capturable=True)
    tiles = title(tiles_of(calls[0]))
    subject = Subject("tiles", geometry, 1, f"{kind} {name}", tiles if place else f"{tiles}, chosen")
    measure(subject, Work(trial.bytes), repetition, trial.rounds[place])
