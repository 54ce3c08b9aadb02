"""The experts' kernel over the frames of the levels' pools, as the engines call it."""

from collections.abc import Sequence
from typing import Protocol

import torch

from cachemoe.kernels import experts_cpu, quantized_cpu
from cachemoe.kernels.experts import experts
from cachemoe.offload.packed import to_device
from cachemoe.offload.pool import ExpertPool
from cachemoe.offload.store import StoreLayout


class Surrogates(Protocol):
    """What stands in for a layer's experts without their pages."""

    def apply(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """``[J, n, H]`` float32, of experts ``[J]`` on the CPU, for tokens ``[n, H]``; no bit depends on the others."""


class Compute:
    """``cachemoe.kernels.experts.experts`` over the frames of the pools of each level."""

    def __init__(
        self, pools: Sequence[ExpertPool], layouts: Sequence[StoreLayout], surrogates: Sequence[Surrogates] = ()
    ):
        """See the class.

        Args:
            surrogates: of each layer, one level more, whose frames are numbers of experts, layer by layer.
        """
        self._pools, self._formats, self._experts = pools, [each.page_format for each in layouts], layouts[0].experts
        self._surrogates = surrogates

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
        if level == len(self._pools):
            self._surrogate(x, frames, gates, out, pending, partial, finish)
            return
        weights, page_format = self._pools[level].weights, self._formats[level]
        if not x.is_cuda:  # without the checks: all of it is the engine's own
            experts_cpu.experts(x, frames, gates, weights, page_format, out, pending, partial, finish)
            return
        frames, gates, *some = to_device(x.device, frames, gates, *([] if pending is None else [pending]))
        pending = some[0] if some else None
        experts(x, frames, gates, weights, page_format, out, pending, partial, finish, self._experts, most)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether ``token`` computes x: on the CPU, of quantised pages, where the C could be compiled."""
        return experts_cpu.in_c(x, self._formats[0])

    def token(self, x: torch.Tensor, frames: list[int], gates: list[float], out: torch.Tensor) -> None:
        """As the kernel, of one token's experts at full precision, none dropped."""
        quantized_cpu.token(x, self._pools[0].weights, frames, gates, self._formats[0], out)

    def some(self, x: torch.Tensor, frames: list[int], pairs: torch.Tensor) -> None:
        """Some of a token's experts at full precision, into pairs ``[n, H]`` that ``weigh`` is to sum."""
        quantized_cpu.some(x, self._pools[0].weights, frames, self._formats[0], pairs)

    def _surrogate(self, x, frames, gates, out, pending, partial, finish) -> None:
        """As the kernel, of experts that have no pages."""
        if partial is None:
            partial = torch.empty(*frames.shape, x.shape[1], dtype=torch.float32, device=x.device)
        now = frames if pending is None else frames.masked_fill(~pending, -1)
        for frame in now.unique().tolist():
            if frame >= 0:
                layer, expert = divmod(frame, self._experts)
                tokens, places = torch.nonzero(now == frame, as_tuple=True)
                chosen = torch.tensor([expert], device="cpu")
                tokens, places = to_device(x.device, tokens, places)
                partial[tokens, places] = self._surrogates[layer].apply(x[tokens], chosen)[0]
        if finish:
            self(x, frames, gates, out, torch.zeros_like(frames, dtype=torch.bool), partial, True, (0, 0))

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
