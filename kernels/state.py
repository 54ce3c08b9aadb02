"""What kernels read and write: who is resident, what a token was given, and how a model scores its experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate, pairwise
from types import SimpleNamespace

import numpy as np
import torch

SCORE_FUNCTIONS = ("softmax", "sigmoid", "relu")
GROUP_SCORES = ("best", "best-two")


@dataclass(frozen=True, eq=False)
class Residency:
    """State of the caches, one a layer or configuration; ``...`` are leading dimensions, absent or not.

    ``route`` reads and writes a state of leading dimension ``[B]``; ``state[i]`` gives views along the first dimension.

    A page is an expert at a level. Of E experts and V levels, page v * E + e is expert e at level v, and level 0 is
    full precision; with one level the pages are the experts. The slots of the cheaper levels come first,
    level by level.

    One cache that all layers share has the pages of layer after layer, V * E of each, and L * E experts;
    ``of_layer(i)`` is what layer i's routing sees and updates.

    Args:
        slot_of: ``[..., V * E]`` int64, the page table: the page's slot, -1 when absent.
        page_of: ``[..., C]`` int64, its inverse: the slot's page, -1 when free. C is the largest capacity, and all
            slots of cheaper levels.
        capacity: ``[...]`` int64, slots in use for full precision. The slots beyond are free, and given to nobody.
        last_use: ``[..., E]`` int64, ``clock`` at the expert's last touch, 0 before it.
        uses: ``[..., E]`` int64, touches.
        clock: ``[...]`` int64, touches of all experts.
        tokens: ``[...]`` int64, tokens routed; ``[L, ...]`` of shared caches, by the layer that routed them.
        range_sum: likewise, float64, sum over those tokens of max(logits) - min(logits).
        heavy: ``[..., E]`` int64, touches at full precision; None with one level, where that is all of them.
        expected: ``[..., L * E]`` int64, 1 of experts that a forecast expects; None where layers share no cache.
        cheaper: slots of each cheaper level.
        layers: L, that share a cache.
        layer: the one of them that is routed.
    """

    slot_of: torch.Tensor
    page_of: torch.Tensor
    capacity: torch.Tensor
    last_use: torch.Tensor
    uses: torch.Tensor
    clock: torch.Tensor
    tokens: torch.Tensor
    range_sum: torch.Tensor
    heavy: torch.Tensor | None = None
    expected: torch.Tensor | None = None
    cheaper: tuple[int, ...] = ()
    layers: int = 1
    layer: int = 0

    @classmethod
    def empty(
        cls, capacity: torch.Tensor, experts: int, cheaper: Sequence[int] = (), layers: int | None = None
    ) -> Residency:
        """Cold caches.

        Args:
            capacity: ``[...]`` int64, slots of each cache for full precision.
            experts: E, of a layer.
            cheaper: slots of each cache for each cheaper level.
            layers: L, that share each cache; None: a cache is of one layer.

        Raises:
            ValueError: if there are less than 1, or more than experts, at a level.
        """
        capacity, shared = torch.as_tensor(capacity, dtype=torch.int64, device="cpu"), layers is not None
        layers = layers or 1
        every = experts * layers
        low, high = min(int(capacity.min()), *cheaper, every), max(int(capacity.max()), *cheaper, 0)
        if low < 1 or high > every:
            raise ValueError(f"a capacity must lie between 1 and the {every} experts of a cache, not {low}..{high}")
        shape = tuple(capacity.shape)
        routed = (layers, *shape) if shared else shape

        def numbers(shape, value=0, dtype=torch.int64):
            return torch.full(shape, value, dtype=dtype, device="cpu")

        return cls(
            slot_of=numbers((*shape, every * (1 + len(cheaper))), -1),
            page_of=numbers((*shape, int(capacity.max()) + sum(cheaper)), -1),
            capacity=capacity.clone(),
            last_use=numbers((*shape, every)),
            uses=numbers((*shape, every)),
            clock=numbers(shape),
            tokens=numbers(routed),
            range_sum=numbers(routed, 0.0, torch.float64),
            heavy=numbers((*shape, every)) if cheaper else None,
            expected=numbers((*shape, every)) if shared else None,
            cheaper=tuple(cheaper),
            layers=layers,
        )

    @property
    def experts(self) -> int:
        """E, of a layer."""
        return self.last_use.shape[-1] // self.layers

    @property
    def shared(self) -> bool:
        """Whether the layers share the caches."""
        return self.tokens.dim() > self.capacity.dim()

    @property
    def levels(self) -> int:
        """V."""
        return 1 + len(self.cheaper)

    @cached_property
    def fewest(self) -> int:
        """Slots of the level that has the fewest, before capacities are looked at."""
        return min((*self.cheaper, self.page_of.shape[-1]))

    @cached_property  # read for every token
    def slots(self) -> tuple[tuple[int, int], ...]:
        """Of each level its first slot, and the one after its last; full precision's end at the largest capacity."""
        ends = (0, *accumulate(self.cheaper))
        return ((ends[-1], self.page_of.shape[-1]), *pairwise(ends))

    @cached_property
    def _starts(self) -> np.ndarray:
        """Of cheaper levels the first slots, then that of full precision."""
        return np.array([0, *accumulate(self.cheaper)])

    def levels_of(self, slots: torch.Tensor) -> torch.Tensor:
        """int64, of each slot on the CPU the level of its pages, -1 where there is no slot."""
        slots = slots.numpy()
        level = np.searchsorted(self._starts, slots, side="right") % self.levels
        return torch.from_numpy(np.where(slots < 0, -1, level))

    def of_layer(self, layer: int) -> Residency:
        """What one of the layers that share the caches sees, and updates."""
        routed = {"tokens": self.tokens[layer], "range_sum": self.range_sum[layer]}
        return replace(self, **routed, layer=layer)

    def __getitem__(self, index) -> Residency:
        return self._each(lambda tensor: tensor[index])

    def clone(self) -> Residency:
        return self._each(torch.clone)

    def repeated(self, count: int) -> Residency:
        """So many copies of one cache, ``[count, ...]`` of ``[1, ...]``."""
        return self._each(lambda tensor: tensor.repeat(count, *[1] * (tensor.dim() - 1)))

    def to(self, device: torch.device | str) -> Residency:
        """The state on another device; the same tensors where they are there already."""
        return self._each(lambda tensor: tensor.to(device))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by name, those that it has."""
        return {name: tensor for name, tensor in vars(self).items() if isinstance(tensor, torch.Tensor)}

    @cached_property  # asked for every token
    def is_contiguous(self) -> bool:
        return all(tensor.is_contiguous() for tensor in self.tensors().values())

    @cached_property  # read for every token
    def on_host(self) -> SimpleNamespace:
        """The tensors' memory on the CPU as numpy arrays of the same names: what is written there is in the tensors."""
        return SimpleNamespace(**{name: tensor.numpy() for name, tensor in self.tensors().items()})

    def with_slots(self, count: int) -> Residency:
        """The state with C = ``count`` slots, ``page_of`` cut or filled up with free ones; the rest is shared."""
        kept = self.page_of[..., :count]
        free = kept.new_full((*kept.shape[:-1], count - kept.shape[-1]), -1)
        return replace(self, page_of=torch.cat((kept, free), -1))

    def resident(self) -> torch.Tensor:
        """``[..., V * E]`` bool: the pages that have a slot."""
        return self.slot_of >= 0

    def _each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Residency:
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors().items()})


STATE = tuple(field.name for field in fields(Residency) if field.type == "torch.Tensor")
"""The tensors that every ``Residency`` has, which kernels know by name."""


@dataclass(slots=True, eq=False)  # made for every token and layer: a frozen one takes three times as long
class Misses:
    """The misses of a call in step order: token by token, by descending gate weight within a token.

    Args:
        pages: ``[B, T * K]`` int64, the missing pages, as ``Residency`` numbers a layer's; -1 from ``count`` on.
        slots: ``[B, T * K]`` int64, the slot that each is to be fetched to; -1 from ``count`` on.
        count: ``[B]`` int64.
    """

    pages: torch.Tensor
    slots: torch.Tensor
    count: torch.Tensor


@dataclass(slots=True, eq=False)
class Routing:
    """What ``route`` decided.

    Args:
        ids: ``[B, T, K]`` int64, distinct experts of each token, the highest selection value first; one that a policy
            swapped in stands in the place of the one that it is for.
        weights: ``[B, T, K]`` float32, gate weights, from the unbiased logits; 0 of a dropped expert.
        slots: ``[B, T, K]`` int64, where each expert's page is, or is to be fetched to, when the token computes, which
            says its level; -1 of a dropped expert, which does not run.
        hits: ``[B, T, K]`` bool, whether the page was resident when the token was routed, and runs.
        misses: what is to be fetched.
        asked: ``[B, T, K]`` int64, the page that the policy asked for, where another may run in its place: an expert at
            a better level, or one swapped in; -1 of a dropped expert. None with one level and no swaps: the expert's.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    slots: torch.Tensor
    hits: torch.Tensor
    misses: Misses
    asked: torch.Tensor | None = None

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that every routing has, in order."""
        misses = (self.misses.pages, self.misses.slots, self.misses.count)
        return (self.ids, self.weights, self.slots, self.hits, *misses)

    def __getitem__(self, caches: slice) -> Routing:
        """The routing of some of the caches, the same memory."""
        *tensors, pages, slots, count = (tensor[caches] for tensor in self.tensors())
        asked = None if self.asked is None else self.asked[caches]
        return Routing(*tensors, Misses(pages, slots, count), asked)

    @classmethod
    def empty(cls, caches: int, tokens: int, top_k: int, device: torch.device | str = "cpu") -> Routing:
        """Memory for the routing of ``[B, T]`` tokens."""

        def integers(*shape):
            return torch.empty(shape, dtype=torch.int64, device=device)

        chosen = (caches, tokens, top_k)
        return cls(
            ids=integers(*chosen),
            weights=torch.empty(chosen, dtype=torch.float32, device=device),
            slots=integers(*chosen),
            hits=torch.empty(chosen, dtype=torch.bool, device=device),
            misses=Misses(integers(caches, tokens * top_k), integers(caches, tokens * top_k), integers(caches)),
        )

    @classmethod
    def all_hits(cls, ids: torch.Tensor, weights: torch.Tensor | None = None) -> Routing:
        """Tokens that find expert e in slot e, wherever the ids are; that nothing is missing is said on the host.

        Args:
            ids: ``[B, T, K]`` int64.
            weights: ``[B, T, K]``; None: experts of a token weigh the same.
        """
        caches, _, k = ids.shape
        weights = ids.new_full(ids.shape, 1 / k, dtype=torch.float32) if weights is None else weights.float()
        nothing = torch.empty(caches, 0, dtype=torch.int64)
        misses = Misses(nothing, nothing, torch.zeros(caches, dtype=torch.int64))
        return cls(ids, weights, ids, torch.ones_like(ids, dtype=torch.bool), misses)


@dataclass(frozen=True)
class GateScores:
    """How a model scores its experts, and which groups of them a token may choose from.

    Args:
        function: from logits to scores, one of ``SCORE_FUNCTIONS``.
        groups: G, consecutive groups of E / G experts.
        top_groups: groups whose experts a token may choose.
        group_score: what ranks the groups: ``best``, a group's highest selection value (DeepSeek-V2), or ``best-two``,
            the sum of the two highest scores, corrected where there is a correction (DeepSeek-V3).
        renormalise: whether the K weights are divided by their sum.
        epsilon: added to that sum.
        scale: factor of the weights.

    Raises:
        ValueError: for an unknown name, or groups that cannot be.
    """

    function: str = "softmax"
    groups: int = 1
    top_groups: int = 1
    group_score: str = "best"
    renormalise: bool = False
    epsilon: float = 0.0
    scale: float = 1.0

    def __post_init__(self):
        if self.function not in SCORE_FUNCTIONS:
            raise ValueError(f"unknown score function {self.function!r}: use {', '.join(SCORE_FUNCTIONS)}")
        if self.group_score not in GROUP_SCORES:
            raise ValueError(f"unknown group score {self.group_score!r}: use {', '.join(GROUP_SCORES)}")
        if not 1 <= self.top_groups <= self.groups:
            raise ValueError(f"a token cannot choose from {self.top_groups} of {self.groups} groups")

    def check(self, experts: int, top_k: int) -> None:
        """Whether K of E experts can be chosen so.

        Raises:
            ValueError: if they cannot.
        """
        if experts % self.groups:
            raise ValueError(f"{experts} experts cannot be split into {self.groups} groups")
        size = experts // self.groups
        if not 1 <= top_k <= self.top_groups * size:
            raise ValueError(f"{top_k} experts cannot be chosen among {self.top_groups} groups of {size}")
        if self.group_score == "best-two" and size < 2:
            raise ValueError("a group of one expert has no two best")


SOFTMAX = GateScores()
