"""What a batch costs in quality: each sequence's bits a token in batches against alone, routed by the cache.

Sequences that share a cache see each other's experts: cache-aware routing then swaps otherwise than for one alone.
"""

import statistics
from collections.abc import Callable
from contextlib import closing

import torch

from cachemoe.benchmarks.growth_points import CONTEXT
from cachemoe.moe.progress import Progress

ROUTING, POOL = "cache-prior:0.5", "50%"
BATCHES = 1, 2, 4, 8
QUALITY_TOKENS = 192  # of each window


def batch_quality(name: str, opened: Callable[[str, str], object], windows: torch.Tensor, progress: Progress) -> dict:
    """The bits a token of the windows, and their misses, decoded in batches of each size from an empty pool.

    Args:
        name: of the model.
        opened: (pool, routing) -> the model.
        windows: ``[8, T]``, of which those after the first ``CONTEXT`` tokens count.
    """
    rows, alone = [], None
    with progress(f"{name}: batches, routed by the cache", len(BATCHES)) as advance:
        for sequences in BATCHES:
            model = opened(POOL, ROUTING)
            with closing(model.cachemoe):
                pairs = [_bits(model, each) for each in windows.split(sequences)]
            bits, misses = torch.cat([each for each, _ in pairs]), [each for _, each in pairs]
            alone = bits if alone is None else alone
            more = (bits - alone).tolist()
            rows.append(
                {
                    "sequences": sequences,
                    "bits_per_token": bits.tolist(),
                    "mean_bits_per_token": bits.mean().item(),
                    "more_than_alone": {"mean": statistics.mean(more), "min": min(more), "max": max(more)},
                    "misses_per_step": statistics.mean(misses),
                }
            )
            advance()
    return {"model": name, "routing": ROUTING, "pool": POOL, "tokens": windows.shape[1] - CONTEXT, "rows": rows}


@torch.inference_mode()
def _bits(model, text: torch.Tensor) -> tuple[torch.Tensor, float]:
    """``[B]`` bits a token after the context, taken token by token, and the misses of a step."""
    output = model(text[:, :CONTEXT], use_cache=True, logits_to_keep=1)
    losses, past, before = [], output.past_key_values, model.cachemoe.counters.misses
    for i in range(CONTEXT, text.shape[1]):
        losses.append(torch.nn.functional.cross_entropy(output.logits[:, -1].float(), text[:, i], reduction="none"))
        output = model(text[:, i : i + 1], past_key_values=past, use_cache=True)
    steps = text.shape[1] - CONTEXT
    bits = torch.stack(losses).mean(0) / torch.log(torch.tensor(2.0))
    return bits, (model.cachemoe.counters.misses - before) / steps
