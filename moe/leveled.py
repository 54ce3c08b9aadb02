"""A model's experts at the level that each choice says, for many tokens: an engine a level, and the sum of all.

A policy's quality is measured beside caches that are simulated; what computes holds whatever it needs.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from cachemoe.kernels.formats import FLOATS, INT4_GROUPS, PageFormat
from cachemoe.kernels.route_cpu import place
from cachemoe.kernels.state import Residency
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.pack import open_packed
from cachemoe.moe.progress import Progress
from cachemoe.moe.swap import RunExperts
from cachemoe.offload.engine import OffloadEngine
from cachemoe.offload.packed import to_host
from cachemoe.offload.residency import least_recently_used


class LeveledExperts:
    """See the module.

    Args:
        engines: of each level, full precision first; on the CPU.
    """

    def __init__(self, engines: Sequence[OffloadEngine]):
        self._engines = engines

    def run(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        """``[S, H]``: of each token the weighted sum of its experts.

        Args:
            hidden: ``[S, H]``.
            ids, weights: ``[S, K]``.
            levels: ``[S, K]`` int64, -1 of an expert that does not run.
        """
        ids, weights, levels = to_host(ids, weights, levels)
        total = torch.zeros_like(hidden)
        for level, engine in enumerate(self._engines):
            here = levels == level
            if (tokens := here.any(1).nonzero().flatten()).numel():
                mine = weights[tokens].masked_fill(~here[tokens], -1.0)  # last in the order of weights
                state = engine.caches(layer)
                routing = place(ids[tokens][None], mine[None], state, least_recently_used, ~here[tokens][None])
                total[tokens] += engine.forward(layer, hidden[tokens].contiguous(), routing)
        return total

    def of(self, state: Residency) -> RunExperts:
        """What ``Swap`` runs: the levels being those of the slots in ``state``, of sequences side by side."""

        def run(layer, hidden, routing):
            chosen = routing.ids, routing.weights.view_as(routing.ids), state.levels_of(routing.slots)
            return self.run(layer, hidden, *(each.flatten(0, 1) for each in chosen))

        return run


@contextmanager
def open_leveled(
    checkpoint: Checkpoint,
    formats: Sequence[PageFormat],
    capacity: Sequence[int],
    progress: Progress,
    first: OffloadEngine | None = None,
) -> Iterator[LeveledExperts]:
    """Engines over the checkpoint's stores, made if they are not there.

    Args:
        formats: of each level.
        capacity: slots of each layer, of each engine.
        first: of full precision, if there is one already.

    Raises:
        InputError: as ``open_packed``.
    """
    with ExitStack() as stack:
        engines = [] if first is None else [first]
        for page_format in formats[len(engines) :]:
            store = open_packed(checkpoint, checkpoint.layout(page_format.kind, page_format.group), progress)
            engines.append(stack.enter_context(OffloadEngine(stack.enter_context(store), capacity)))
        yield LeveledExperts(engines)


def cheaper_format(checkpoint: Checkpoint, better: PageFormat, kind: str | None = None) -> PageFormat:
    """The pages of a level below one.

    Args:
        kind: None: int4, or int8 where the experts' sizes do not fit int4's groups; below int4, int2.

    Raises:
        InputError: if the experts do not fit into such pages.
    """
    if kind is None:
        kind = "int2" if better.kind == "int4" else "int4"
        if better.kind in FLOATS and any(size % min(INT4_GROUPS) for size in (better.hidden, better.intermediate)):
            kind = "int8"
    return checkpoint.layout(kind).page_format
