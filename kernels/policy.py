"""What a routing policy is: pure functions of what routing knows of an expert, and the knobs that they read.

One definition of a function runs as torch, as numpy and inside the Triton kernel, and gives each the same bits: it uses
arithmetic and comparison operators alone. A comparison is multiplied by a number before anything is subtracted from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature

import torch

KEY_WORDS = ("value", "rank", "before", "have", "span", "a")
"""What a key can see of each expert, float32 but for ``have``: ``value``, what the model selects by; ``rank``, how many
candidates it ranks better; ``before``, the share of the scores that those have; ``have``, int, 0 where absent, 1 where
resident; ``span``, the mean range of the layer's values over the tokens before; ``a``, a knob."""

KNOBS = ("j", "a")
"""Of a cache: J, the best-ranked experts that are always kept, all K where K is less; and what the key reads."""


@dataclass(frozen=True, eq=False)
class Policy:
    """How a token's experts are chosen in B caches.

    Args:
        key: a function of some of ``KEY_WORDS``, named in their order -> a number for each expert, the highest of which
            are chosen beside the J best-ranked; what it does not name is not computed. None: the model's own choice.
        knobs: ``[B, len(KNOBS)]`` float32, contiguous, where the logits are; needed with a key. A captured graph reads
            what is written there.

    Raises:
        ValueError: if the key names another word, or in another order, or has no knobs.
    """

    key: Callable | None = None
    knobs: torch.Tensor | None = None

    def __post_init__(self):
        if self.key is None:
            return
        if self.words != tuple(word for word in KEY_WORDS if word in self.words):
            raise ValueError(f"a key's parameters are some of {', '.join(KEY_WORDS)}, in this order, not {self.words}")
        knobs = self.knobs
        if knobs is None or knobs.dim() != 2 or knobs.shape[1] != len(KNOBS) or knobs.dtype != torch.float32:
            raise ValueError(f"a key needs knobs [B, {len(KNOBS)}] float32")

    @cached_property  # read for every token
    def words(self) -> tuple[str, ...]:
        """Those that the key names."""
        return () if self.key is None else tuple(signature(self.key).parameters)

    def to(self, device: torch.device | str) -> Policy:
        """The policy with its knobs on a device."""
        return self if self.knobs is None else replace(self, knobs=self.knobs.to(device))


ORIGINAL = Policy()
