"""The experts' kernel over the frames of the levels' pools, as the engines call it."""

from collections.abc import Sequence

import torch

from cachemoe.kernels import experts_cpu
from cachemoe.kernels.experts import experts
from cachemoe.offload.packed import to_device
from cachemoe.offload.pool import ExpertPool
from cachemoe.offload.store import StoreLayout


class Compute:
    """``cachemoe.kernels.experts.experts`` over the frames of the pools of each level."""

    def __init__(self, pools: Sequence[ExpertPool], layouts: Sequence[StoreLayout]):
        self._pools, self._formats, self._experts = pools, [each.page_format for each in layouts], layouts[0].experts

    def __call__(
        self, x, frames, gates, out, pending=None, partial=None, finish=True, most=None, levels: Sequence[int] = (0,)
    ) -> None:
        """As the kernel.

        Args:
            levels: one, of all pairs to be computed; or of one token the level of each place, -1 of a dropped one.
        """
        level, *others = {level for level in levels if level >= 0}
        if others:
            self._mixed(x, frames, gates, out, pending, partial, finish, levels)
            return
        weights, page_format = self._pools[level].weights, self._formats[level]
        if not x.is_cuda:  # without the checks: all of it is the engine's own
            experts_cpu.experts(x, frames, gates, weights, page_format, out, pending, partial, finish)
            return
        frames, gates, *some = to_device(x.device, frames, gates, *([] if pending is None else [pending]))
        pending = some[0] if some else None
        experts(x, frames, gates, weights, page_format, out, pending, partial, finish, self._experts, most)

    def _mixed(self, x, frames, gates, out, pending, partial, finish, levels) -> None:
        """One token whose places have different levels: level by level into ``partial``, and one sum at the end."""
        if partial is None:
            partial = torch.empty(*frames.shape, x.shape[1], dtype=torch.float32, device=x.device)
        at = torch.tensor([levels], device="cpu")
        used = [level for level in dict.fromkeys(levels) if level >= 0]
        for level in used:
            here = at == level if pending is None else pending & (at == level)
            last = finish and level == used[-1]
            self(x, frames, gates, out, here, partial, last, levels=(level,))
