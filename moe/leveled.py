"""A model's experts at the level that each choice says, for many tokens: an engine a level, and the sum of all.

A policy's quality is measured beside caches that are simulated; what computes holds whatever it needs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch

from cachemoe.kernels.formats import FLOATS, GROUPS, PageFormat
from cachemoe.kernels.route_cpu import place
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.low_rank import LowRank
from cachemoe.moe.pack import open_packed
from cachemoe.moe.progress import Progress
from cachemoe.moe.strategies import Strategy
from cachemoe.moe.surrogates import bytes_of, open_surrogates
from cachemoe.moe.swap import RunExperts
from cachemoe.offload.engine import OffloadEngine
from cachemoe.offload.packed import to_host
from cachemoe.offload.residency import least_recently_used


class LeveledExperts:
    """See the module.

    Args:
        engines: of each level that has pages, full precision first; on the CPU.
        surrogates: by their rank, of each layer.
    """

    def __init__(self, engines: Sequence[OffloadEngine], surrogates: Mapping[int, Sequence[LowRank]]):
        self._engines, self.surrogates = engines, surrogates

    def surrogate_bytes(self) -> dict[int, int]:
        """By rank, what a layer's surrogates take."""
        return {rank: bytes_of(each) for rank, each in self.surrogates.items()}

    def run(
        self,
        layer: int,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        levels: torch.Tensor,
        rank: int | None = None,
    ) -> torch.Tensor:
        """``[S, H]``: of each token the weighted sum of its experts.

        Args:
            hidden: ``[S, H]``.
            ids, weights: ``[S, K]``.
            levels: ``[S, K]`` int64, -1 of an expert that does not run.
            rank: of the surrogates that level 1 is; None: it has pages.
        """
        ids, weights, levels = to_host(ids, weights, levels)
        total = torch.zeros_like(hidden)
        if rank is not None:
            for e in ids[levels == 1].unique().tolist():
                tokens, places = ((levels == 1) & (ids == e)).nonzero(as_tuple=True)
                y = self.surrogates[rank][layer].apply(hidden[tokens], torch.tensor([e]))[0]
                total.index_add_(0, tokens, (weights[tokens, places, None].float() * y).to(total.dtype))
        for level, engine in enumerate(self._engines if rank is None else self._engines[:1]):
            here = levels == level
            if (tokens := here.any(1).nonzero().flatten()).numel():
                mine = weights[tokens].masked_fill(~here[tokens], -1.0)  # last in the order of weights
                state = engine.caches(layer)
                routing = place(ids[tokens][None], mine[None], state, least_recently_used, ~here[tokens][None])
                total[tokens] += engine.forward(layer, hidden[tokens].contiguous(), routing)
        return total

    def of(self, strategy: Strategy, levels_of: Callable[[torch.Tensor], torch.Tensor]) -> RunExperts:
        """What ``Swap`` runs, of sequences side by side.

        Args:
            levels_of: from the slots of a ``Routing`` to the levels.
        """
        rank = strategy.value if strategy.rule.resident else None

        def run(layer, hidden, routing):
            chosen = routing.ids, routing.weights.view_as(routing.ids), levels_of(routing.slots)
            return self.run(layer, hidden, *(each.flatten(0, 1) for each in chosen), rank)

        return run


@contextmanager
def open_leveled(
    checkpoint: Checkpoint,
    formats: Sequence[PageFormat],
    capacity: Sequence[int],
    progress: Progress,
    first: OffloadEngine | None = None,
    ranks: Iterable[int] = (),
) -> Iterator[LeveledExperts]:
    """Engines over the checkpoint's stores, and surrogates, made if they are not there.

    Args:
        formats: of each level.
        capacity: slots of each layer, of each engine.
        first: of full precision, if there is one already.
        ranks: of the surrogates.

    Raises:
        InputError: as ``open_packed`` and ``open_surrogates``.
    """
    with ExitStack() as stack:
        engines = [] if first is None else [first]
        for page_format in formats[len(engines) :]:
            store = open_packed(checkpoint, checkpoint.layout(page_format.kind, page_format.group), progress)
            engines.append(stack.enter_context(OffloadEngine(stack.enter_context(store), capacity)))
        yield LeveledExperts(engines, {rank: open_surrogates(checkpoint, rank, progress) for rank in ranks})


def ranks_of(strategies: Iterable[Strategy]) -> list[int]:
    """Of the surrogates that the strategies ask for."""
    return sorted({int(strategy.value) for strategy in strategies if strategy.rule.resident})


def cheaper_format(checkpoint: Checkpoint, better: PageFormat, kind: str | None = None) -> PageFormat:
    """The pages of a level below one.

    Args:
        kind: None: int4, or int8 where the experts' sizes do not fit int4's groups; below int4, int2.

    Raises:
        InputError: if the experts do not fit into such pages.
    """
    if kind is None:
        kind = "int2" if better.kind == "int4" else "int4"
        if better.kind in FLOATS and any(size % min(GROUPS) for size in (better.hidden, better.intermediate)):
            kind = "int8"
    return checkpoint.layout(kind).page_format
