"""What a token takes beside reading weights: a small model of the same kind decodes, through a pool as any.

Between its layers as many weights are read as the checkpoint's model has in a layer. That time is taken off, but the
weights leave the processor's caches as cold as the model's own will, and the rest is slower for it. How fast they are
read there is what the prediction counts with.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.decode_step import install_steps
from cachemoe.moe.dense import round_dense
from cachemoe.moe.layers import moe_layers
from cachemoe.moe.load import swap
from cachemoe.moe.models import outside, small_model
from cachemoe.moe.progress import Progress
from cachemoe.moe.speeds import Reading
from cachemoe.offload.errors import InputError

ROUNDS, WARM_UP, TOKENS = 5, 2, 6


@dataclass(frozen=True)
class LayerCost:
    """Seconds beside reading weights.

    Args:
        token_s: of a token whose experts all hit.
        missing_s: more, of a layer that has misses: of asking for them, not of waiting.
    """

    token_s: float
    missing_s: float


def layer_cost(
    checkpoint: Checkpoint,
    kind: str,
    dense: str | None,
    dtype: torch.dtype,
    readings: Sequence[Reading],
    progress: Progress,
) -> LayerCost:
    """Measure what a token takes beside weights, on a random model of the checkpoint's class with as many layers.

    Args:
        kind, dense: of the pages and of the other weights, as ``load`` takes them.
        dtype: of the model's hidden states.
        readings: of weights, each called once in every MoE layer.

    Raises:
        InputError: if there is no such model, or it misses no expert in a pool of half of them.
    """
    model, shape = small_model(checkpoint, dtype), checkpoint.shape

    def making(_, steps: int) -> AbstractContextManager[Callable[[], None]]:
        return progress("making a small model of the same kind", steps)

    with closing(swap(model, shape.experts, format=kind, progress=making)) as pooled:
        if dense is not None:
            round_dense(model, dense, making)
            pooled.join(install_steps(model))

        def read(*_) -> None:
            for reading in readings:
                reading()

        blocks = {layer.block for layer in moe_layers(model)}
        for module in list(model.modules()):
            if not blocks.isdisjoint(module.children()):  # a hook in it would part what is one call
                module.register_forward_hook(read)
        pooled.calls.close()  # which might change the number of threads
        engine, half = pooled.engine, max(shape.top_k, shape.experts // 2)
        total = 2 * ROUNDS * (WARM_UP + TOKENS)
        failed = outside("the small model on which the cost of its layers is measured cannot be run")
        hitting, more, generator = [], [], torch.Generator().manual_seed(0)
        with progress("decoding with a small model", total) as advance, failed:
            for _ in range(ROUNDS):  # in turns, since what else the machine does slows both
                pooled.resize(shape.experts)
                engine.state.slot_of[:] = engine.state.page_of[:] = torch.arange(shape.experts)
                engine.fill()
                hits = [seconds for seconds, _ in _decode(model, readings, generator, advance)]
                pooled.resize(half)
                misses = _decode(model, readings, generator, advance)
                hitting += hits
                more += [(seconds - median(hits)) / layers for seconds, layers in misses if layers]
    if not more:
        raise InputError(
            f"a small {checkpoint.config.get('model_type')} misses no expert in a pool of half of them, so that the "
            "cost of a miss cannot be measured on it"
        )
    return LayerCost(median(hitting), max(0.0, median(more)))


@torch.inference_mode()
def _decode(
    model, readings: Sequence[Reading], generator: torch.Generator, advance: Callable[[], None]
) -> list[tuple[float, int]]:
    """Of each of ``TOKENS`` random tokens how many layers had misses, and the seconds.

    Without those of the readings, and those that the engine has waited for pages.
    """
    text = torch.randint(0, model.config.vocab_size, (WARM_UP + TOKENS, 1, 1), generator=generator)
    cache, tokens, pooled = None, [], model.cachemoe
    for token in text:
        misses, calls = [layer.misses for layer in pooled.layers], [len(reading.seconds) for reading in readings]
        waited, start = pooled.counters.stall_s, perf_counter()
        cache = model(token, past_key_values=cache, use_cache=True).past_key_values
        seconds = perf_counter() - start - (pooled.counters.stall_s - waited)
        seconds -= sum(reading.spent(first) for reading, first in zip(readings, calls, strict=True))
        tokens.append((seconds, sum(layer.misses > was for layer, was in zip(pooled.layers, misses, strict=True))))
        advance()
    return tokens[WARM_UP:]
