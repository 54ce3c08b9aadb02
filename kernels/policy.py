"""What a routing policy is: pure functions of what routing knows of an expert, and the knobs that they read.

One definition of a function runs as torch, as numpy and inside the Triton kernel, and gives each the same bits: it uses
arithmetic and comparison operators alone. A comparison is multiplied by a number before anything is subtracted from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature

import numpy as np
import torch

KEY_WORDS = ("value", "rank", "before", "have", "span", "cost", "noise", "a", "b")
"""What a key can see of each expert, float32 but for ``have``: ``value``, what the model selects by; ``rank``, how many
candidates it ranks better; ``before``, the share of the scores that those have; ``have``, int, 0 where absent, 1 where
resident; ``span``, the mean range of the layer's values over the tokens before; ``cost``, the logarithm of how many
times as long as a resident's the expert's output takes, 0 for residents; ``noise``, in [0, 1), drawn for each expert
and token, the same at each run; ``a`` and ``b``, knobs."""

GRADE_WORDS = ("value", "weight", "first", "before", "place", "have", "cost", "noise", "a", "b")
"""What a grade can see of each of the K chosen, as above but for: ``weight``, the share of the K's scores that the
expert has; ``first``, the share of the best; ``before``, the shares of those in better places; ``place``, 0 for the
best."""

KNOBS = ("j", "a", "b", "miss", "regret", "seed")
"""Of a cache: J, the best-ranked experts that are always kept, all K where K is less; what key and grade read; the
``cost`` of an absent expert; the bound of what a swap gives up; and what ``noise`` is drawn from, a whole number."""


@dataclass(frozen=True, eq=False)
class Policy:
    """How a token's experts are chosen, and which of them run, in B caches.

    Args:
        key: a function of some of ``KEY_WORDS``, named in their order -> a number for each expert, the highest of which
            are chosen beside the J best-ranked; what it does not name is not computed. None: the model's own choice.
        grade: likewise of ``GRADE_WORDS`` -> a level for each of the K chosen: 0 runs, below 0 does not. The
            best always runs. Weights are the model's own rule over those that run. None: all K run.
        bounded: whether the knob ``regret`` holds: of the pairs of an expert that the key brought in and one of the
            model's own K that left for it, the best with the worst first, only those stay in which the score of the
            second exceeds that of the first by less; at 0 none.
        knobs: ``[B, len(KNOBS)]`` float32, contiguous, where the logits are; needed with a key or grade. A captured
            graph reads what is written there.

    Raises:
        ValueError: if a function names another word, or in another order, or there are no knobs for it.
    """

    key: Callable | None = None
    grade: Callable | None = None
    bounded: bool = False
    knobs: torch.Tensor | None = None

    def __post_init__(self):
        for function, known in ((self.key, KEY_WORDS), (self.grade, GRADE_WORDS)):
            words = _words(function)
            if words != tuple(word for word in known if word in words):
                raise ValueError(
                    f"the parameters of {function.__name__} are some of {', '.join(known)}, in this order, not {words}"
                )
        knobs = self.knobs
        if self.key or self.grade:
            form = knobs is not None and (knobs.dim(), knobs.shape[-1:], knobs.dtype, knobs.is_contiguous())
            if form != (2, (len(KNOBS),), torch.float32, True):
                raise ValueError(f"a key or a grade needs knobs [B, {len(KNOBS)}] float32, contiguous")

    @cached_property  # read for every token
    def words(self) -> tuple[str, ...]:
        """Those that the key names."""
        return _words(self.key)

    @cached_property
    def grade_words(self) -> tuple[str, ...]:
        """Those that the grade names."""
        return _words(self.grade)

    @cached_property
    def place_of(self) -> dict[str, int]:
        """Of each of the key's words its place among the parameters."""
        return {word: place for place, word in enumerate(self.words)}

    @cached_property
    def draws(self) -> bool:
        """Whether either names ``noise``."""
        return "noise" in self.words or "noise" in self.grade_words

    @cached_property
    def knobs_on_host(self) -> np.ndarray:
        """The knobs' memory on the CPU: what is written to the tensor is here too."""
        return self.knobs.numpy()

    def to(self, device: torch.device | str) -> Policy:
        """The policy with its knobs on a device."""
        return self if self.knobs is None else replace(self, knobs=self.knobs.to(device))


def noise_bits(index):
    """int64 of 24 bits from int64 index: the end of MurmurHash3, in operators that torch, numpy and Triton share."""
    h = index & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return (h ^ (h >> 16)) >> 8


def _words(function: Callable | None) -> tuple[str, ...]:
    return () if function is None else tuple(signature(function).parameters)


ORIGINAL = Policy()
