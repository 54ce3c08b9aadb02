"""Staging: frames beside the layers' slots, in which prefetched pages wait until their layer asks for them.

A prefetch evicts nothing. A page that is used changes frames with the slot that it goes to; one that is not is dropped
as soon as its layer has chosen.
"""

from collections.abc import Callable, Iterable, Sequence
from time import perf_counter

import torch

from cachemoe.offload.counters import Counters
from cachemoe.offload.link import Link, Transfer
from cachemoe.offload.prefetch import Prefetcher, lands_in_time

STAGING = 12  # pages ahead at a time, where nobody says otherwise
SMOOTHING = 0.1  # weight of the newest interval in the mean time from layer to layer


class Staging:
    """Prefetched pages, and the decision which to ask for.

    Args:
        link: moves them.
        frames: to put them in: as many pages can be ahead at a time.
        page_bytes: of a page.
        held: (layer, expert) -> whether its slot has the page already.

    Attributes:
        prefetcher: says what the next layers will want; None for no prefetch.
    """

    def __init__(
        self,
        link: Link,
        frames: Sequence[int],
        page_bytes: int,
        held: Callable[[int, int], bool],
    ):
        self.prefetcher: Prefetcher | None = None
        self._link, self._page_bytes, self._held = link, page_bytes, held
        self._free = list(frames)
        self._ahead: dict[tuple[int, int], Transfer] = {}
        self._dropped: list[Transfer] = []  # of no use any more, and still moving
        self._predicted: dict[int, set[int]] = {}
        self._last_call: tuple[int, float] | None = None
        self._layer_s: float | None = None

    def adopt(self, layer: int, expert: int, frame: int, counters: Counters) -> Transfer | None:
        """Take a page, and leave the frame in exchange for its own; None if it is not staged, or could not be read.

        The page may still be on its way: it is a demand from now on.
        """
        transfer = self._ahead.pop((layer, expert), None)
        if transfer is None:
            return None
        if transfer.error is not None:  # nobody waited for it: the demand that follows tries again
            counters.failed_prefetches += 1
            self._free.append(transfer.frame)
            return None
        self._free.append(frame)
        if transfer.landed:
            counters.prefetch_hits += 1
        else:
            counters.late_prefetches += 1
            self._link.promote(transfer)
        return transfer

    def chosen(self, layer: int, ids: Sequence[int], counters: Counters) -> None:
        """The layer has chosen, and what it wanted has been adopted: compare with the prediction, drop the rest."""
        if (predicted := self._predicted.pop(layer, None)) is not None:
            counters.predicted += len(predicted)
            counters.predicted_right += len(predicted.intersection(ids))
        self._discard(layer, counters)

    def look_ahead(self, layer: int, gate_input: torch.Tensor, ids: list[int], layers: int, counters: Counters) -> None:
        """Predict for the layers after this one, and ask for the pages that are expected to land in time."""
        began = self._interval(layer)
        if self._dropped:
            self._reclaim(counters)
        if self.prefetcher is None:
            return
        self.prefetcher.observe(layer, ids)
        # Where not even the farthest layer could be served in time, predicting would cost time for nothing.
        if not self._lands_in_time(self.prefetcher.ahead, began):
            return
        for later, experts in self.prefetcher.predict(layer, gate_input):
            self._predicted[later] = set(experts)
            for e in experts:
                if (later, e) in self._ahead or self._held(later, e):
                    continue
                if not self._lands_in_time((later - layer) % layers or layers, began):
                    break
                counters.prefetches += 1
                self._ahead[later, e] = self._link.request(later, e, self._free.pop(), demand=False)

    def _lands_in_time(self, distance: int, began: float) -> bool:
        """Whether there is room for a page, and it would land before the layer at that distance needs it."""
        if not self._free or self._layer_s is None or (speed := self._link.bytes_per_second) is None:
            return False
        latency = self._link.pacing.latency if self._link.pacing else 0.0
        needed_in = distance * self._layer_s - (perf_counter() - began)
        return lands_in_time(self._link.queued_bytes, self._page_bytes, speed, latency, needed_in)

    def drop(self, counters: Counters) -> None:
        """Drop every page, and wait for those that are moving."""
        for later in {later for later, _ in self._ahead}:
            self._discard(later, counters)
        self._predicted.clear()
        self._link.abandon()
        self._reclaim(counters)

    def reset(self, frames: Iterable[int]) -> None:
        """Begin anew with these frames; nothing may be moving."""
        self._free, self._last_call = list(frames), None
        self._ahead.clear()
        self._dropped.clear()
        self._predicted.clear()

    def _discard(self, layer: int, counters: Counters) -> None:
        """Take back what was staged for a layer, or let it land and be dropped."""
        for page in [page for page in self._ahead if page[0] == layer]:
            transfer = self._ahead.pop(page)
            if self._link.cancel(transfer):
                counters.cancelled_prefetches += 1
                self._free.append(transfer.frame)
            else:
                self._dropped.append(transfer)

    def _reclaim(self, counters: Counters) -> None:
        """Free the frames of dropped pages that have landed."""
        for transfer in [transfer for transfer in self._dropped if transfer.landed]:
            self._dropped.remove(transfer)
            self._free.append(transfer.frame)
            if transfer.error is None:
                counters.wasted_prefetches += 1
                counters.count_page(self._page_bytes)
            else:
                counters.failed_prefetches += 1

    def _interval(self, layer: int) -> float:
        """Follow the mean time from one layer's call to the next; returns when this one began."""
        now = perf_counter()
        if self._last_call is not None and layer == self._last_call[0] + 1:
            passed = now - self._last_call[1]
            self._layer_s = passed if self._layer_s is None else self._layer_s + SMOOTHING * (passed - self._layer_s)
        self._last_call = layer, now
        return now
