"""What a routing policy is: pure functions of what routing knows of an expert, and the knobs that they read.

One definition of a function runs as torch, as numpy and inside the Triton kernel, and gives each the same bits: it uses
arithmetic and comparison operators alone. A comparison is multiplied by a number before anything is subtracted from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from inspect import signature

import numpy as np
import torch

KEY_WORDS = ("value", "rank", "before", "have", "span", "cost", "noise", "table", "a", "b")
"""What a key can see of each expert, float32 but for ``have``: ``value``, what the model selects by; ``rank``, how many
candidates it ranks better; ``before``, the share of the scores that those have; ``have``, int, 0 where absent, else 1 +
the best level resident; ``span``, the mean range of the layer's values over the tokens before; ``cost``, the logarithm
of how many times as long as a resident's the expert's output takes, 0 for residents; ``noise``, in [0, 1), drawn for
each expert and token, the same at each run; ``table``, a number of the expert's own; ``a`` and ``b``, knobs."""

GRADE_WORDS = ("value", "weight", "first", "before", "place", "have", "cost", "noise", "table", "a", "b")
"""What a grade can see of each of the K chosen, as above but for: ``weight``, the share of the K's scores that the
expert has; ``first``, the share of the best; ``before``, the shares of those in better places; ``place``, 0 for the
best."""

EVICT_WORDS = ("last_use", "uses", "heavy", "expected", "distance", "clock")
"""What an eviction policy can see of each expert, int64: ``last_use``, the clock at its last touch; ``uses``, its
touches; ``heavy``, those at full precision; ``expected``, 1 where a forecast says that this token's later layers choose
it, else 0; ``distance``, after how many layers its own runs, 1 for the next; and
``clock``, one number, the touches of all experts before the token."""

DROP, SWAP = -1, -2
"""Levels of a grade beside 0, full precision, and the cheaper ones 1, 2, ...: the expert does not run; or, where it is
absent, the best-ranked resident that the token does not use yet and whose ``table`` is the same runs in its place, and
where there is none, the expert at full precision."""

KNOBS = ("j", "a", "b", "miss", "regret", "seed")
"""Of a cache: J, the best-ranked experts that are always kept, all K where K is less; what key and grade read; the
``cost`` of an absent expert; the bound of what a swap gives up; and what ``noise`` is drawn from, a whole number."""


@dataclass(frozen=True, eq=False)
class Policy:
    """How a token's experts are chosen, and which of them run, in B caches.

    Args:
        key: a function of some of ``KEY_WORDS``, named in their order -> a number for each expert, the highest of which
            are chosen beside the J best-ranked; what it does not name is not computed. None: the model's own choice.
        grade: likewise of ``GRADE_WORDS`` -> a level for each of the K chosen, a whole number: 0 at full precision, 1,
            2, ... a cheaper one, ``DROP`` or ``SWAP``. The best always runs. A better level that is resident serves a
            request for a cheaper one. None: all K run at full precision.
        bounded: whether the knob ``regret`` holds: of the pairs of an expert that the key brought in and one of the
            model's own K that left for it, the best with the worst first, only those stay in which the score of the
            second exceeds that of the first by less; at 0 none.
        knobs: ``[B, len(KNOBS)]`` float32, contiguous, where the logits are; needed with a key or grade. A captured
            graph reads what is written there.
        table: ``[B, E]`` float32, contiguous, where the logits are, the word ``table``; by which ``SWAP`` tells who may
            stand in for whom.
        swaps: whether the grade gives ``SWAP``.
        renormalises: whether weights are the model's own rule over the experts that run; else each expert's share stays
            what it would be among the K chosen, whoever of them does not run.

    Raises:
        ValueError: if a function names another word, or in another order, or there are no knobs or no table for it.
    """

    key: Callable | None = None
    grade: Callable | None = None
    bounded: bool = False
    knobs: torch.Tensor | None = None
    table: torch.Tensor | None = None
    swaps: bool = False
    renormalises: bool = True

    def __post_init__(self):
        for function, known in ((self.key, KEY_WORDS), (self.grade, GRADE_WORDS)):
            words = words_of(function)
            if words != tuple(word for word in known if word in words):
                raise ValueError(
                    f"the parameters of {function.__name__} are some of {', '.join(known)}, in this order, not {words}"
                )
        knobs = self.knobs
        if self.key or self.grade:
            form = knobs is not None and (knobs.dim(), knobs.shape[-1:], knobs.dtype, knobs.is_contiguous())
            if form != (2, (len(KNOBS),), torch.float32, True):
                raise ValueError(f"a key or a grade needs knobs [B, {len(KNOBS)}] float32, contiguous")
        if self.swaps or "table" in self.words + self.grade_words:
            table = self.table
            if table is None or (table.dim(), table.dtype, table.is_contiguous()) != (2, torch.float32, True):
                raise ValueError("a policy that swaps, or names `table`, needs a table [B, E] float32, contiguous")

    @cached_property  # read for every token
    def words(self) -> tuple[str, ...]:
        """Those that the key names."""
        return words_of(self.key)

    @cached_property
    def grade_words(self) -> tuple[str, ...]:
        """Those that the grade names."""
        return words_of(self.grade)

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
        """The policy with its tensors on a device."""
        there = {name: each.to(device) for name in ("knobs", "table") if (each := getattr(self, name)) is not None}
        return replace(self, **there)

    def repeated(self, count: int) -> Policy:
        """One cache's policy for so many."""
        there = {name: each for name in ("knobs", "table") if (each := getattr(self, name)) is not None}
        return replace(self, **{name: each.repeat(count, 1) for name, each in there.items()})


def noise_bits(index):
    """int64 of 24 bits from int64 index: the end of MurmurHash3, in operators that torch, numpy and Triton share."""
    h = index & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return (h ^ (h >> 16)) >> 8


@cache
def words_of(function: Callable | None) -> tuple[str, ...]:
    """The words that a function of a policy, or an eviction policy, names."""
    return () if function is None else tuple(signature(function).parameters)


ORIGINAL = Policy()
