"""Decode step by step and count what each step read: the bound that stands beside its time is made of that."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from cachemoe.moe.doors import PooledParameter


@dataclass(frozen=True)
class Step:
    """One step: a token of each sequence.

    Args:
        seconds: that it took.
        unique: of each MoE layer, experts that at least one of the tokens used.
        misses: experts that were not resident, in all layers.
        disk_bytes: of the pages that were read.
        keys_values_bytes: of the keys and values of the tokens before, of all sequences.
    """

    seconds: float
    unique: list[int]
    misses: int
    disk_bytes: int
    keys_values_bytes: int


@dataclass(frozen=True)
class StepBytes:
    """Bytes that a step reads: a mean over steps.

    Args:
        dense: from memory, of all weights but the experts and the embedding, of which a token reads a row alone.
        experts: from memory, of the unique experts' weights, in all layers.
        keys_values: from memory, of the tokens before.
        disk: of pages.
    """

    dense: int
    experts: float
    keys_values: float
    disk: float

    @property
    def memory(self) -> float:
        """Of all that comes from memory."""
        return self.dense + self.experts + self.keys_values

    def bound(self, memory: float, disk: float) -> float:
        """Seconds that the bytes take, memory's and then the disk's.

        What the processor's cache keeps from token to token is faster, and pages come from the disk while residents are
        computed: a small model, or one that misses a little, may take less.

        Args:
            memory, disk: bandwidths, bytes a second.
        """
        return self.memory / memory + self.disk / disk


@torch.inference_mode()
def read_prompt(model, text: torch.Tensor):
    """The cache of keys and values after tokens ``[B, T]`` at once."""
    return model(text, use_cache=True, logits_to_keep=1).past_key_values


@torch.inference_mode()
def decode(model, past, text: torch.Tensor) -> list[Step]:
    """Take the text token by token, whatever the model would have said; ``past`` has as many tokens after as before.

    What a step used is what changed in the pool's own counts; they are read while no clock runs.

    Args:
        model: as ``load`` gives it, of one level, on a CPU.
        past: of B sequences.
        text: ``[B, T]``.
    """
    steps, engine = [], model.cachemoe.engine
    for tokens in text.T:
        uses, misses, read = engine.state.uses.clone(), engine.counters.misses, engine.counters.bytes_read
        keys_values = sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)
        start = perf_counter()
        model(tokens[:, None], past_key_values=past, use_cache=True)
        seconds = perf_counter() - start
        unique = (engine.state.uses != uses).sum(1).tolist()
        counters = engine.counters
        steps.append(Step(seconds, unique, counters.misses - misses, counters.bytes_read - read, keys_values))
    past.crop(-text.shape[1])
    return steps


def dense_bytes(model) -> int:
    """Bytes of all weights of a model in a pool that every token reads: neither the experts' nor the embedding's.

    An embedding that is the head as well is read as the head.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    left_out = None if getattr(head, "weight", None) is embedding.weight else embedding.weight
    tensors = {id(each): each for each in (*model.parameters(), *model.buffers())}.values()
    return sum(each.nbytes for each in tensors if not isinstance(each, PooledParameter) and each is not left_out)


def step_bytes(model, steps: Sequence[Step]) -> StepBytes:
    """What the steps read, on average."""
    weight_bytes = model.cachemoe.engine.page_format.weight_bytes
    return StepBytes(
        dense_bytes(model),
        statistics.mean(sum(step.unique) * weight_bytes for step in steps),
        statistics.mean(step.keys_values_bytes for step in steps),
        statistics.mean(step.disk_bytes for step in steps),
    )


def unique_experts(steps: Sequence[Step]) -> list[float]:
    """Of each MoE layer, the mean of its unique experts."""
    return [statistics.mean(counts) for counts in zip(*(step.unique for step in steps), strict=True)]
