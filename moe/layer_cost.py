"""What a token takes beside reading weights: a small model of the same kind decodes, through a pool as any.

Between its layers as many weights are read as the checkpoint's model has in a layer. That time is taken off, but the
weights leave the processor's caches as cold as the model's own will, and the rest is slower for it. How fast they are
read there is what the prediction counts with.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
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
from cachemoe.moe.pack import store_directory
from cachemoe.moe.progress import Progress
from cachemoe.moe.speeds import Reading, page_landing
from cachemoe.offload.errors import InputError

PROMPT, TOKENS = 8, 24


@dataclass(frozen=True)
class LayerCost:
    """Seconds beside reading weights.

    Args:
        token_s: of a token whose experts all hit.
        missing_s: more, of a layer that has misses, without the time until its pages have landed.
    """

    token_s: float
    missing_s: float


def layer_cost(
    checkpoint: Checkpoint,
    kind: str | None,
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
    with closing(swap(model, shape.experts, format=kind, progress=progress)) as pooled:
        if dense is not None:
            round_dense(model, dense, progress)
            install_steps(model)

        def read(*_) -> None:
            for reading in readings:
                reading()

        for layer in moe_layers(model):
            layer.experts.register_forward_hook(read)
        engine = pooled.engine
        engine.state.slot_of[:] = engine.state.page_of[:] = torch.arange(shape.experts)
        engine.fill()
        with outside("the small model on which the cost of its layers is measured cannot be run"):
            with progress("decoding with a small model", 2 * (PROMPT + TOKENS)) as advance:
                token_s = median(seconds for seconds, _ in _decode(model, readings, advance))
                pooled.resize(max(shape.top_k, shape.experts // 2))
                tokens = _decode(model, readings, advance)
        pages = len(shape.layers) * shape.experts
        landing = page_landing(engine.page_format, shape.top_k, pages, store_directory(), progress)
    if not (missing := [(seconds, misses) for seconds, misses in tokens if misses]):
        raise InputError(
            f"a small {checkpoint.config.get('model_type')} misses no expert in a pool of half of them, so that the "
            "cost of a miss cannot be measured on it"
        )
    more = [(seconds - token_s - sum(map(landing.of, misses))) / len(misses) for seconds, misses in missing]
    return LayerCost(token_s, max(0.0, median(more)))


@torch.inference_mode()
def _decode(model, readings: Sequence[Reading], advance: Callable[[], None]) -> list[tuple[float, list[int]]]:
    """Of each of ``TOKENS`` random tokens after a prompt the seconds without the readings', and by layer the misses."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, model.config.vocab_size, (PROMPT + TOKENS, 1, 1), generator=generator)
    cache, tokens, layers = None, [], model.cachemoe.layers
    for token in text:
        before, read = [layer.misses for layer in layers], [len(reading.seconds) for reading in readings]
        start = perf_counter()
        cache = model(token, past_key_values=cache, use_cache=True).past_key_values
        seconds = perf_counter() - start
        seconds -= sum(sum(reading.seconds[first:]) for reading, first in zip(readings, read, strict=True))
        misses = [layer.misses - was for layer, was in zip(layers, before, strict=True)]
        tokens.append((seconds, [count for count in misses if count]))
        advance()
    return tokens[PROMPT:]
