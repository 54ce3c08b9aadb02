"""How many experts a batch needs: unique ones of each layer, and the bytes of a step, for 1 to 8 sequences."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict

import torch

from cachemoe.benchmarks.growth_decode import decode, read_prompt, step_bytes, unique_experts
from cachemoe.benchmarks.growth_points import ALL, CONTEXT, WARM_UP
from cachemoe.moe.progress import Progress

SEQUENCES = range(1, 9)
POOLS = ALL, "50%"


def by_chance(experts: int, top_k: int, sequences: int) -> float:
    """Unique experts of E, expected where each of the tokens draws K of them evenly."""
    return experts * (1 - (1 - top_k / experts) ** sequences)


def count_batches(name: str, opened: Callable[[str], object], windows: torch.Tensor, progress: Progress) -> dict:
    """Of each pool and B the mean unique experts, misses and bytes of a step; B sequences are the first B windows.

    Args:
        name: of the model, for the report.
        opened: pool -> the model.
        windows: ``[8, T]``, of which those after the first ``CONTEXT`` tokens count.
        progress: shows the decoding.
    """
    pools = []
    for pool in POOLS:
        model, rows = opened(pool), []
        shape = model.cachemoe.shape
        with closing(model.cachemoe), progress(f"{name}, pool {pool}: counting experts", len(SEQUENCES)) as advance:
            past = read_prompt(model, windows[:, : CONTEXT - WARM_UP])
            for sequences in reversed(SEQUENCES):  # one prompt for all: each B leaves the last sequence out
                past.batch_select_indices(torch.arange(sequences))
                steps = decode(model, past, windows[:sequences, CONTEXT - WARM_UP :])[WARM_UP:]
                read, unique = step_bytes(model, steps), unique_experts(steps)
                row = {
                    "sequences": sequences,
                    "unique_experts": sum(unique) / len(unique),
                    "unique_experts_by_layer": unique,
                    "unique_experts_by_chance": by_chance(shape.experts, shape.top_k, sequences),
                    "misses": sum(step.misses for step in steps) / len(steps),
                    "bytes": asdict(read),
                    "memory_bytes": read.memory,
                    "disk_bytes": read.disk,
                }
                rows.insert(0, row)
                advance()
            pools.append({"pool": pool, "slots": model.cachemoe.layers[0].slots, "rows": rows})
    page_format = model.cachemoe.engine.page_format
    return {
        "model": name,
        "layers": len(shape.layers),
        "experts": shape.experts,
        "top_k": shape.top_k,
        "label": model.cachemoe.label,
        "format": page_format.kind,
        "dense": model.cachemoe.dense and model.cachemoe.dense.kind,
        "weight_bytes": page_format.weight_bytes,
        "page_bytes": page_format.page_bytes,
        "steps": len(steps),
        "pools": pools,
    }
