"""What kernels read and write: who is resident, what a token was given, and how a model scores its experts."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

SCORE_FUNCTIONS = ("softmax", "sigmoid", "relu")
GROUP_SCORES = ("best", "best-two")


@dataclass
class Residency:
    """State of the caches, one a layer or configuration; ``...`` are leading dimensions, absent or not.

    ``route`` reads and writes a state of leading dimension ``[B]``; ``state[i]`` gives views along the first dimension.

    Args:
        slot_of: ``[..., E]`` int64, the page table: the expert's slot, -1 when absent.
        expert_of: ``[..., C]`` int64, its inverse: the slot's expert, -1 when free. C is the largest capacity.
        capacity: ``[...]`` int64, slots in use. Slots from ``capacity`` on are given to nobody.
        last_use: ``[..., E]`` int64, ``clock`` at the expert's last touch, 0 before it.
        uses: ``[..., E]`` int64, touches.
        clock: ``[...]`` int64, touches of all experts.
        tokens: ``[...]`` int64, tokens routed.
        range_sum: ``[...]`` float64, sum over those tokens of max(logits) - min(logits).
    """

    slot_of: torch.Tensor
    expert_of: torch.Tensor
    capacity: torch.Tensor
    last_use: torch.Tensor
    uses: torch.Tensor
    clock: torch.Tensor
    tokens: torch.Tensor
    range_sum: torch.Tensor

    @classmethod
    def empty(cls, capacity: torch.Tensor, experts: int) -> Residency:
        """Cold caches.

        Args:
            capacity: ``[...]`` int64, slots of each cache.
            experts: E.

        Raises:
            ValueError: if a capacity is below 1 or above E.
        """
        capacity = torch.as_tensor(capacity, dtype=torch.int64, device="cpu")
        low, high = int(capacity.min()), int(capacity.max())
        if low < 1 or high > experts:
            raise ValueError(f"a capacity must lie between 1 and the {experts} experts of a layer, not {low}..{high}")
        shape = tuple(capacity.shape)
        return cls(
            slot_of=torch.full((*shape, experts), -1, dtype=torch.int64, device="cpu"),
            expert_of=torch.full((*shape, high), -1, dtype=torch.int64, device="cpu"),
            capacity=capacity.clone(),
            last_use=torch.zeros((*shape, experts), dtype=torch.int64, device="cpu"),
            uses=torch.zeros((*shape, experts), dtype=torch.int64, device="cpu"),
            clock=torch.zeros(shape, dtype=torch.int64, device="cpu"),
            tokens=torch.zeros(shape, dtype=torch.int64, device="cpu"),
            range_sum=torch.zeros(shape, dtype=torch.float64, device="cpu"),
        )

    def __getitem__(self, index) -> Residency:
        return Residency(*(getattr(self, field.name)[index] for field in fields(self)))

    def clone(self) -> Residency:
        return Residency(*(getattr(self, field.name).clone() for field in fields(self)))

    def to(self, device: torch.device | str) -> Residency:
        """The state on another device; the same tensors where they are there already."""
        return Residency(*(getattr(self, field.name).to(device) for field in fields(self)))

    def with_slots(self, count: int) -> Residency:
        """The state with C = ``count`` slots, ``expert_of`` cut or filled up with free ones; the rest is shared."""
        kept = self.expert_of[..., :count]
        free = kept.new_full((*kept.shape[:-1], count - kept.shape[-1]), -1)
        return replace(self, expert_of=torch.cat((kept, free), -1))

    def resident(self) -> torch.Tensor:
        """``[..., E]`` bool: the experts that have a slot."""
        return self.slot_of >= 0


STATE = tuple(field.name for field in fields(Residency))
"""The tensors of a ``Residency``, which kernels know by name."""


@dataclass(slots=True, eq=False)  # made for every token and layer: a frozen one takes three times as long
class Misses:
    """The misses of a call in step order: token by token, by descending gate weight within a token.

    Args:
        experts: ``[B, T * K]`` int64, the missing experts; -1 from ``count`` on.
        slots: ``[B, T * K]`` int64, the slot that each is to be fetched to; -1 from ``count`` on.
        count: ``[B]`` int64.
    """

    experts: torch.Tensor
    slots: torch.Tensor
    count: torch.Tensor


@dataclass(slots=True, eq=False)
class Routing:
    """What ``route`` decided.

    Args:
        ids: ``[B, T, K]`` int64, distinct experts of each token, the highest selection value first.
        weights: ``[B, T, K]`` float32, gate weights, from the unbiased logits; 0 of a dropped expert.
        slots: ``[B, T, K]`` int64, where each expert's page is, or is to be fetched to, when the token computes; -1 of
            a dropped expert, which does not run.
        hits: ``[B, T, K]`` bool, whether the expert was resident when the token was routed, and runs.
        misses: what is to be fetched.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    slots: torch.Tensor
    hits: torch.Tensor
    misses: Misses

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of them, in order."""
        misses = (self.misses.experts, self.misses.slots, self.misses.count)
        return (self.ids, self.weights, self.slots, self.hits, *misses)

    def __getitem__(self, caches: slice) -> Routing:
        """The routing of some of the caches, the same memory."""
        *tensors, experts, slots, count = (tensor[caches] for tensor in self.tensors())
        return Routing(*tensors, Misses(experts, slots, count))

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
