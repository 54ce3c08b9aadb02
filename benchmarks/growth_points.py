"""What ``cachemoe growth`` measures: points that differ from one base in one thing, an axis a thing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from cachemoe.benchmarks.synthetic import VOCABULARY, check_shape
from cachemoe.moe.config import format_of
from cachemoe.moe.shape import MoeShape
from cachemoe.moe.sizes import slots_of
from cachemoe.offload.errors import InputError

LAYERS, EXPERTS, TOP_K, CONTEXT, ALL = 4, 32, 4, 64, "100%"  # of the base
WARM_UP = 4  # tokens before those on the clock, in every round


@dataclass(frozen=True)
class Point:
    """A model, and how it decodes.

    Args:
        shape: of the model.
        pool: as ``load`` takes it.
        sequences: B, that a step takes a token each of.
        context: tokens before the first one on the clock, of each sequence.
    """

    shape: MoeShape
    pool: str = ALL
    sequences: int = 1
    context: int = CONTEXT


def base_of(hidden: int, intermediate: int, longest: int) -> Point:
    """The point that every axis changes one thing of.

    Args:
        hidden, intermediate: H and I.
        longest: tokens of the longest sequence that a model has to take.
    """
    return Point(MoeShape(tuple(range(LAYERS)), EXPERTS, TOP_K, hidden, intermediate, VOCABULARY, longest))


def _of_shape(base: Point, **change) -> Point:
    return replace(base, shape=replace(base.shape, **change))


AXES: dict[str, Callable[[Point, int | str], Point]] = {
    "context": lambda base, count: replace(base, context=count),
    "experts": lambda base, count: _of_shape(base, experts=count),
    "layers": lambda base, count: _of_shape(base, layers=tuple(range(count))),
    "batch": lambda base, count: replace(base, sequences=count),
    "pool": lambda base, pool: replace(base, pool=pool),
}


def points_of(
    values: Mapping[str, Sequence[int | str]], base: Point, format: str | None
) -> dict[str, list[tuple[int | str, Point]]]:
    """Each axis's points, in the order of ``AXES``, with the values that tell them apart.

    Args:
        values: of the axes that are measured.
        format: of the pages, as ``load`` takes it.

    Raises:
        InputError: for an axis, or a point, that cannot be.
    """
    if unknown := set(values).difference(AXES):
        raise InputError(f"unknown axis {min(unknown)!r}: choose among {', '.join(AXES)}")
    size = base.shape.hidden, base.shape.intermediate
    check_shape(base.shape)
    page_bytes = format_of(format, None, {}, size, torch.bfloat16, bias=False).page_bytes
    points = {}
    for axis in (axis for axis in AXES if axis in values):
        points[axis] = [(value, AXES[axis](base, value)) for value in dict.fromkeys(values[axis])]
        for _, point in points[axis]:
            check_shape(point.shape)
            slots_of(point.pool, point.shape, page_bytes)
            if point.sequences < 1:
                raise InputError(f"a step of {point.sequences} sequences cannot be: choose 1 or more")
            if point.context <= WARM_UP:
                raise InputError(f"a context of {point.context} tokens is too short: choose more than {WARM_UP}")
    return points
