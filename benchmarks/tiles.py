"""The experts' kernels with other tiles than the heuristics choose: evidence for ``cachemoe.kernels.experts_tiles``."""

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton

from cachemoe.benchmarks.compile_cases import experts_arguments, pair_results
from cachemoe.benchmarks.geometries import GEOMETRIES
from cachemoe.kernels.experts_decode import plan_decode
from cachemoe.kernels.experts_prefill import plan_prefill
from cachemoe.kernels.experts_tiles import DecodeTiles, PrefillTiles
from cachemoe.kernels.launch import Launch

TRIED = [(geometry, kind) for geometry in ("qwen3-30b-a3b", "gpt-oss-20b", "mixtral-8x7b") for kind in ("bf16", "int4")]
TRIED += [("qwen3-30b-a3b", "int8"), ("qwen3-30b-a3b", "int2")]
"""Geometries and page formats: the finest experts, the coarsest, and widths that are no powers of two."""

LAUNCHES = ("gate_up", "down")

PROMPT = 512
PROMPTS = ("qwen3-30b-a3b", "olmoe", "mixtral-8x7b")
"""Geometries that a prompt of so many tokens is tried with, in bf16: some 32, 64 and 128 pairs an expert."""

PREFILL_TRIED = [
    (PrefillTiles(m, gate_up, k, warps, stages), PrefillTiles(m, down, k, warps, stages))
    for m, gate_up, down, k, warps, stages in (
        (32, 64, 128, 64, 4, 3),
        (64, 64, 64, 64, 4, 4),
        (64, 64, 128, 64, 8, 3),
        (64, 128, 128, 32, 8, 4),
        (64, 128, 256, 32, 8, 4),
        (128, 64, 128, 32, 8, 4),
    )
]
"""Tiles of both products: taller and wider ones read less from the cache for each operation, and pad more."""


def tiles_of(launch: Launch) -> DecodeTiles:
    """The tiles of a decode launch."""
    constants = launch.constants
    return DecodeTiles(constants["BLOCK_N"], constants["BLOCK_K"], launch.num_warps, constants["STAGES"])


def retile(launch: Launch, tiles: DecodeTiles) -> Launch:
    """A decode launch with other tiles."""
    outputs = launch.arguments["I"] if "I" in launch.arguments else launch.arguments["H"]
    return replace(
        launch,
        grid=(triton.cdiv(outputs, tiles.block_n), launch.grid[1]),
        constants=launch.constants | {"BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "STAGES": tiles.stages},
        num_warps=tiles.warps,
        pipelined=tiles.stages > 1,
    )


def neighbours(tiles: DecodeTiles, least_k: int) -> list[DecodeTiles]:
    """``tiles`` and those a step away: another shape, size, number of warps or depth.

    Args:
        least_k: the shortest ``block_k`` that the kernel takes.
    """
    n, k, warps, stages = tiles.block_n, tiles.block_k, tiles.warps, tiles.stages
    steps = [
        tiles,
        *(replace(tiles, stages=depth) for depth in (stages - 1, stages + 1, stages + 2)),
        *(replace(tiles, warps=count) for count in (warps // 2, warps * 2)),
        *(DecodeTiles(n // 2, k * factor, warps, stages) for factor in (1, 2)),
        *(DecodeTiles(n * factor, k // 2, warps, stages) for factor in (1, 2)),
        DecodeTiles(n // 2, k * 2, warps, stages + 1),  # the most bytes in flight: a processor has few programs of down
        DecodeTiles(n * 2, k, warps, stages),
        DecodeTiles(n // 2, k, warps // 2, stages),
    ]
    return [step for step in dict.fromkeys(steps) if step.block_n and step.block_k >= least_k and step.warps]


def retiled(launch: Launch) -> list[Launch]:
    """A decode launch, and the same with the neighbours of its tiles."""
    return [retile(launch, tiles) for tiles in neighbours(tiles_of(launch), least_k=16)]


def title(tiles: DecodeTiles) -> str:
    """In a table."""
    return f"{tiles.block_n} x {tiles.block_k}, {tiles.warps} warps, {tiles.stages} stages"


def prefill_title(tiles: tuple[PrefillTiles, PrefillTiles]) -> str:
    """In a table."""
    gate_up, down = tiles
    sizes = f"{gate_up.block_m} x {gate_up.block_n} and {down.block_n} x {gate_up.block_k}"
    return f"{sizes}, {gate_up.warps} warps, {gate_up.stages} stages"


def meta_launches(geometry: str, kind: str) -> dict[str, Launch]:
    """The launches of one token, ``gate_up`` and ``down``, without memory."""
    shape = GEOMETRIES[geometry]
    launches = plan_decode(*experts_arguments(shape, shape.page_format(kind), torch.bfloat16, 1))
    return dict(zip(LAUNCHES, launches, strict=True))


def tile_cases() -> Iterator[tuple[str, Launch]]:
    """(what it is for, launch) of all that the microbenchmarks try."""
    for geometry, kind in TRIED:
        for name, launch in meta_launches(geometry, kind).items():
            for other in retiled(launch):
                yield f"{GEOMETRIES[geometry].title}, {kind} {name}, {title(tiles_of(other))}", other
    for geometry in PROMPTS:
        shape = GEOMETRIES[geometry]
        arguments = experts_arguments(shape, shape.page_format("bf16"), torch.bfloat16, PROMPT)
        for tiles in PREFILL_TRIED:
            for launch in plan_prefill(*arguments, pair_results(shape, PROMPT), tiles=tiles):
                yield f"{shape.title}, bf16, {prefill_title(tiles)}", launch
