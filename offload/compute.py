"""The experts' kernel over the frames of a pool, as the engines call it."""

from cachemoe.kernels import experts_cpu
from cachemoe.kernels.experts import experts
from cachemoe.offload.packed import to_device
from cachemoe.offload.pool import ExpertPool
from cachemoe.offload.store import StoreLayout


class Compute:
    """``cachemoe.kernels.experts.experts`` over the frames of a pool."""

    def __init__(self, pool: ExpertPool, layout: StoreLayout):
        self._pool, self._format, self._experts = pool, layout.page_format, layout.experts

    def __call__(self, x, frames, gates, out, pending=None, partial=None, finish=True, most=None) -> None:
        if not x.is_cuda:  # without the checks: all of it is the engine's own
            experts_cpu.experts(x, frames, gates, self._pool.weights, self._format, out, pending, partial, finish)
            return
        frames, gates, *some = to_device(x.device, frames, gates, *([] if pending is None else [pending]))
        pending = some[0] if some else None
        weights, among = self._pool.weights, self._experts
        experts(x, frames, gates, weights, self._format, out, pending, partial, finish, among, most)
