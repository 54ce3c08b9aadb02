"""Microbenchmarks' figures: what one repetition measured, and what the repetitions come to beside their bound."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from cachemoe.benchmarks.geometries import GEOMETRIES
from cachemoe.benchmarks.micro_model import INSTRUCTIONS, expected_seconds

MEMORY = "memory_bytes_per_second"
PINNED = "pinned_copy_bytes_per_second"
MATMUL = "matmul_flops_per_second"
IN_TURN = f"{MEMORY} + {PINNED}"


@dataclass(frozen=True)
class Subject:
    """What was measured; repetitions of the same subject are aggregated.

    Args:
        kernel: ``experts``, ``route``, ``fetch``, ``read-through``, ``step``, ``tiles`` or ``engine``.
        geometry: name in ``GEOMETRIES``.
        tokens: T.
        variant: page format, or routing strategy.
        implementation: whose.
    """

    kernel: str
    geometry: str
    tokens: int
    variant: str
    implementation: str


@dataclass(frozen=True)
class Work:
    """What one call cannot do without.

    Args:
        bytes: weights read or moved; 0 where what is moved is too little to bound the time.
        flops: of the matmuls.
        link: the machine's speed that bounds ``bytes``, ``MEMORY`` or ``PINNED``.
        missed: bytes of weights that come from pinned memory besides, as if one took turns with the other: the bound is
            the sum.
    """

    bytes: int = 0
    flops: int = 0
    link: str = MEMORY
    missed: int = 0


@dataclass(frozen=True)
class Measurement:
    """One repetition.

    Args:
        seconds: median seconds of a call.
        rounds: rounds timed.
        calls: calls in a round.
        timing: ``Round.timing``.
    """

    subject: Subject
    work: Work
    repetition: int
    seconds: float
    rounds: int
    calls: int
    timing: str


def bound(work: Work, speeds: Mapping[str, float]) -> tuple[float, str] | None:
    """Seconds that the work takes at least at the machine's measured speeds, and which speed says so; None: unbounded.

    Args:
        work: of one call.
        speeds: measured in the same run, by ``MEMORY``, ``PINNED`` and ``MATMUL``.
    """
    bounds = []
    if work.missed:
        bounds.append((work.bytes / speeds[work.link] + work.missed / speeds[PINNED], IN_TURN))
    elif work.bytes:
        bounds.append((work.bytes / speeds[work.link], work.link))
    if work.flops:
        bounds.append((work.flops / speeds[MATMUL], MATMUL))
    return max(bounds, default=None)


def model(subject: Subject, speeds: Mapping[str, float], gpu: str) -> float | None:
    """Seconds that ``micro_model`` expects; None: it is of another kernel, of more tokens or of another GPU.

    Args:
        speeds: as for ``bound``.
        gpu: its name; empty without one.
    """
    ours = subject.kernel == "experts" and subject.implementation == "cachemoe" and subject.tokens == 1
    if not (ours and subject.variant in INSTRUCTIONS and "H100" in gpu):
        return None
    return expected_seconds(GEOMETRIES[subject.geometry], subject.variant, speeds[MEMORY])


def aggregate(measurements: Iterable[Measurement], speeds: Mapping[str, float], gpu: str = "") -> list[dict]:
    """A row for each subject, in the order first measured: median, least and greatest of its repetitions' medians.

    Args:
        speeds, gpu: as for ``model``.
    """
    repetitions: dict[Subject, list[Measurement]] = {}
    for measurement in measurements:
        repetitions.setdefault(measurement.subject, []).append(measurement)
    rows = []
    for subject, members in repetitions.items():
        seconds = [member.seconds for member in members]
        median, work = statistics.median(seconds), members[0].work
        limit = bound(work, speeds)
        rows.append(
            asdict(subject)
            | {
                "seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
                "repetitions": len(members),
                "rounds": [member.rounds for member in members],
                "calls_a_round": members[0].calls,
                "timing": members[0].timing,
                "bytes": work.bytes + work.missed,
                "missed_bytes": work.missed,
                "flops": work.flops,
                "bytes_per_second": (work.bytes + work.missed) / median,
                "bound_seconds": limit and limit[0],
                "bound_by": limit and limit[1],
                "percent_of_bound": limit and 100 * limit[0] / median,
                "model_seconds": model(subject, speeds, gpu),
            }
        )
    return rows
