"""How the cost of decode grows: with context, experts, layers, sequences in a step, and the pool.

    cachemoe growth

Every axis changes one thing of one random model. The points of an axis are in memory together and take turns, round by
round, in a new order each. Beside each stands its bound: the bytes that a step reads, over the machine's bandwidths.
"""

import gc
import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from cachemoe.benchmarks.growth_batches import SEQUENCES, count_batches
from cachemoe.benchmarks.growth_decode import Step, StepBytes, decode, read_prompt, step_bytes, unique_experts
from cachemoe.benchmarks.growth_models import Files, made
from cachemoe.benchmarks.growth_points import CONTEXT, WARM_UP, Point, base_of, points_of
from cachemoe.benchmarks.growth_quality import QUALITY_TOKENS, batch_quality
from cachemoe.benchmarks.ratios import ratios
from cachemoe.benchmarks.speeds import memory_bandwidth, store_bandwidths
from cachemoe.kernels.rounded_cpu import KINDS
from cachemoe.moe.checkpoint import STEEPMOE, TINYMOE, Checkpoint
from cachemoe.moe.load import load
from cachemoe.moe.machine import describe
from cachemoe.moe.progress import Progress
from cachemoe.moe.text import held_out_text, load_tokens
from cachemoe.offload.errors import InputError
from cachemoe.offload.store import ExpertStore

BATCH = "batch"  # the axis that unique experts belong to
SHIPPED = TINYMOE, STEEPMOE
UNROUNDED = "none"


@dataclass(frozen=True)
class GrowthOptions:
    """What the command is asked.

    Args:
        values: of each axis that is measured, by its name.
        hidden, intermediate: H and I of the models.
        format: of the pages.
        dense: int8, int4, or none.
        rounds: turns of each point.
        tokens: steps on the clock in each.
    """

    values: dict[str, Sequence[int | str]]
    hidden: int
    intermediate: int
    format: str
    dense: str
    rounds: int
    tokens: int


@dataclass
class Measured:
    """A point's measurements.

    Args:
        value: that tells it from the axis's others.
        slots: of each layer.
        label: what differs from the model.
        read: bytes of a step on the clock; set when all rounds are there.
        rounds: the steps on the clock, round by round.
    """

    value: int | str
    point: Point
    slots: int
    label: str
    read: StepBytes | None = None
    rounds: list[list[Step]] = field(default_factory=list)

    def row(self, memory: float, disk: float) -> dict:
        """The report's figures, with the bound at these bandwidths."""
        shape, steps = self.point.shape, [step for steps in self.rounds for step in steps]
        bound, unique = self.read.bound(memory, disk), unique_experts(steps)
        times = [statistics.median(step.seconds for step in steps) for steps in self.rounds]
        spread = {"median": statistics.median(times), "min": min(times), "max": max(times)}
        return {
            "value": self.value,
            "layers": len(shape.layers),
            "experts": shape.experts,
            "context": self.point.context,
            "sequences": self.point.sequences,
            "pool": self.point.pool,
            "slots": self.slots,
            "label": self.label,
            "ms_per_step": {name: seconds * 1e3 for name, seconds in spread.items()},
            "ms_per_token": spread["median"] * 1e3 / self.point.sequences,
            "bound_ms": bound * 1e3,
            "of_bound": ratios(times, [bound] * len(times)),
            "unique_experts": statistics.mean(unique),
            "unique_experts_by_layer": unique,
            "misses": statistics.mean(step.misses for step in steps),
            "bytes": asdict(self.read),
            "memory_bytes": self.read.memory,
            "disk_bytes": self.read.disk,
            "seconds": [[step.seconds for step in steps] for steps in self.rounds],
        }


def run_growth(options: GrowthOptions, progress: Progress) -> dict:
    """The report: milliseconds a step of every point beside its bound, and the unique experts of batches.

    Raises:
        InputError: for options that cannot be, before anything is made.
    """
    if options.dense not in (*KINDS, UNROUNDED):
        raise InputError(f"--dense is {', '.join(KINDS)} or {UNROUNDED}, not {options.dense!r}")
    dense = None if options.dense == UNROUNDED else options.dense
    counted = options.rounds * options.tokens
    longest = max(CONTEXT + counted, max(options.values.get("context", ()), default=0) + options.tokens)
    base = base_of(options.hidden, options.intermediate, longest)
    points = points_of(options.values, base, options.format)
    each = [point for of_axis in points.values() for _, point in of_axis]
    most = max(*SEQUENCES, *(point.sequences for point in each))
    text = prose(most, max(point.context for point in each) + options.rounds * (WARM_UP + options.tokens))
    windows = prose(len(SEQUENCES), CONTEXT + counted)
    fewest = min(Checkpoint(folder).shape.context for folder in SHIPPED)
    if BATCH in points and CONTEXT + counted > fewest:
        raise InputError(
            f"{options.rounds} rounds of {options.tokens} tokens after {CONTEXT} are more than the {fewest} that the "
            "built-in models take: choose fewer"
        )
    measured, memory, batches, quality = {}, [], [], []
    with made(base.shape, options.format, progress) as files:
        with ExpertStore(files.store) as store:
            disk = store_bandwidths(store)
        for axis, of_axis in points.items():
            memory.append(memory_bandwidth())
            measured[axis] = _measure(axis, of_axis, (base, files), text, options, dense, progress)
            gc.collect()  # a model and its pool know each other: memory of closed ones would stay
        if BATCH in points:
            opened = {"synthetic": lambda pool: files.load(pool, dense, progress)}
            opened |= {folder.name: _as_it_is(folder, progress) for folder in SHIPPED}
            batches = [count_batches(name, each, windows, progress) for name, each in opened.items()]
            text = prose(len(SEQUENCES), min(fewest, CONTEXT + QUALITY_TOKENS))
            quality = [batch_quality(each.name, _as_it_is(each, progress), text, progress) for each in SHIPPED]
    speeds = {
        "memory_bytes_per_second": max(memory),  # the best: a bound is no bound at less
        "disk_bytes_per_second": statistics.median(disk["bare"]),
        "memory_measurements": memory,
        "disk_measurements": disk["bare"],
    }
    bandwidths = speeds["memory_bytes_per_second"], speeds["disk_bytes_per_second"]
    return {
        "command": "growth",
        "machine": describe(),
        "base": {
            "layers": len(base.shape.layers),
            "experts": base.shape.experts,
            "top_k": base.shape.top_k,
            "hidden": base.shape.hidden,
            "intermediate": base.shape.intermediate,
            "context": base.context,
            "sequences": base.sequences,
            "pool": base.pool,
        },
        "format": options.format,
        "dense": dense,
        "routing": "original",
        "rounds": options.rounds,
        "tokens": options.tokens,
        "warm_up": WARM_UP,
        "speeds": speeds,
        "axes": {axis: [each.row(*bandwidths) for each in rows] for axis, rows in measured.items()},
        "batches": batches,
        "batch_quality": quality,
    }


def _as_it_is(folder: Path, progress: Progress) -> Callable[..., object]:
    """What opens a checkpoint with a pool and a routing, nothing rounded."""
    return lambda pool, routing=None: load(folder, pool, routing, device="cpu", progress=progress)[0]


def prose(sequences: int, length: int) -> torch.Tensor:
    """``[sequences, length]`` tokens: the default prose cut into as many windows, of each the beginning.

    Raises:
        InputError: if the windows are shorter.
    """
    window = len(held_out_text()) // sequences
    if length > window:
        raise InputError(
            f"the prose cut into {sequences} gives sequences of {window} tokens, and this run needs {length}: choose a "
            "shorter context or fewer sequences"
        )
    return load_tokens(None, 256, sequences * window).view(sequences, window)[:, :length]


def _measure(
    axis: str,
    points: list[tuple[int | str, Point]],
    base: tuple[Point, Files],
    text: torch.Tensor,
    options: GrowthOptions,
    dense: str | None,
    progress: Progress,
) -> list[Measured]:
    """Load what the axis's points need, and let them decode in turns.

    Args:
        base: whose files are there.
        text: ``[B, T]``, of which each point takes as much as it needs.
    """
    with ExitStack() as stack:
        models, turns = {}, []
        for value, point in points:
            if (which := (point.shape, point.pool)) not in models:
                with ExitStack() as making:
                    ours = point.shape == base[0].shape
                    files = base[1] if ours else making.enter_context(made(point.shape, options.format, progress))
                    models[which] = files.load(point.pool, dense, progress)
                stack.callback(models[which].cachemoe.close)
            model, before = models[which], point.context - WARM_UP
            past = read_prompt(model, text[: point.sequences, :before])
            rest = text[: point.sequences, before:].split(WARM_UP + options.tokens, dim=1)
            turns.append(
                (Measured(value, point, model.cachemoe.layers[0].slots, model.cachemoe.label), model, past, rest)
            )
        order, shuffle = list(turns), random.Random(0).shuffle
        with progress(f"{axis}: decoding", options.rounds * len(turns)) as advance:
            for i in range(options.rounds):
                shuffle(order)
                for measured, model, past, rest in order:
                    measured.rounds.append(decode(model, past, rest[i])[WARM_UP:])
                    advance()
        for measured, model, *_ in turns:
            measured.read = step_bytes(model, [step for steps in measured.rounds for step in steps])
        return [measured for measured, *_ in turns]
