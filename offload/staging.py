"""Staging: frames beside the layers' slots, in which prefetched pages wait until their layer asks for them.

A prefetch evicts nothing. A page that is used changes frames with the slot that it goes to; one that is not is dropped
as soon as its layer has chosen.
"""

from collections.abc import Callable, Sequence
from time import perf_counter

import torch

from cachemoe.offload.counters import Counters
from cachemoe.offload.link import BACKGROUND, PREFETCH, Link, Transfer
from cachemoe.offload.prefetch import Prefetcher, lands_in_time
from cachemoe.offload.store import StoreLayout

STAGING = 12  # pages ahead at a time, where nobody says otherwise
SMOOTHING = 0.1  # weight of the newest interval in the mean time from layer to layer


class Staging:
    """Prefetched pages, and the decision which to ask for.

    Pages are numbered as ``Residency`` numbers a layer's: of full precision they are the experts.

    Args:
        link: moves them.
        frames: of each level, to put them in: as many pages can be ahead at a time.
        layouts: of the pages of each level.
        held: (layer, page) -> whether a slot has it already.

    Attributes:
        prefetcher: says what the next layers will want; None for no prefetch.
    """

    def __init__(
        self,
        link: Link,
        frames: Sequence[Sequence[int]],
        layouts: Sequence[StoreLayout],
        held: Callable[[int, int], bool],
    ):
        self.prefetcher: Prefetcher | None = None
        self._link, self._held, self._experts = link, held, layouts[0].experts
        self._page_bytes = [layout.page_format.page_bytes for layout in layouts]
        self._free = [list(each) for each in frames]
        self._ahead: dict[tuple[int, int], Transfer] = {}
        self._dropped: list[Transfer] = []  # of no use any more, and still moving
        self._predicted: dict[int, set[int]] = {}
        self._last_call: tuple[int, float] | None = None
        self._layer_s: float | None = None

    def adopt(self, layer: int, page: int, frame: int, counters: Counters) -> Transfer | None:
        """Take a page, and leave the frame in exchange for its own; None if it is not staged, or could not be read.

        The page may still be on its way: it is a demand from now on.
        """
        transfer = self._ahead.pop((layer, page), None)
        if transfer is None:
            return None
        if transfer.error is not None:  # nobody waited for it: the demand that follows tries again
            counters.failed_prefetches += 1
            self._release(transfer)
            return None
        self._free[transfer.level].append(frame)
        ahead = transfer.cause == PREFETCH
        if transfer.landed:
            counters.prefetch_hits += ahead
        else:
            counters.late_prefetches += ahead
            self._link.promote(transfer)
        return transfer

    def chosen(self, layer: int, pages: Sequence[int], counters: Counters) -> None:
        """The layer has chosen, and what it wanted has been adopted: compare with the prediction, drop the rest."""
        if (predicted := self._predicted.pop(layer, None)) is not None:
            counters.predicted += len(predicted)
            counters.predicted_right += len(predicted.intersection(pages))
        self._discard(layer, counters)

    def look_ahead(
        self, layer: int, gate_input: torch.Tensor, pages: list[int], layers: int, counters: Counters
    ) -> None:
        """Predict for the layers after this one, and ask for the pages that are expected to land in time."""
        began = self._interval(layer)
        if self._dropped:
            self._reclaim(counters)
        if self.prefetcher is None:
            return
        self.prefetcher.observe(layer, pages)
        # Where not even the farthest layer could be served in time, predicting would cost time for nothing.
        if not self._lands_in_time(self.prefetcher.ahead, began, len(self._page_bytes) - 1):
            return
        for later, expected in self.prefetcher.predict(layer, gate_input):
            self._predicted[later] = set(expected)
            for page in expected:
                if (later, page) in self._ahead or self._held(later, page):
                    continue
                if not self._lands_in_time((later - layer) % layers or layers, began, page // self._experts):
                    break
                counters.prefetches += 1
                self._ask(later, page, PREFETCH)

    def ask_idle(self, layer: int, expert: int) -> None:
        """Ask for a page of full precision, if there is room for it and the link has nothing else to do."""
        if (layer, expert) not in self._ahead and self._free[0] and not self._link.queued_bytes:
            self._ask(layer, expert, BACKGROUND)

    def brought(self, counters: Counters) -> list[tuple[int, int, Transfer]]:
        """Layer, expert and transfer of each page that idle time has brought; they stay staged."""
        landed = [(place, each) for place, each in self._ahead.items() if each.cause == BACKGROUND and each.landed]
        for place, transfer in landed:
            if transfer.error is not None:
                counters.failed_prefetches += 1
                self._release(self._ahead.pop(place))
        return [(*place, transfer) for place, transfer in landed if transfer.error is None]

    def admit(self, layer: int, expert: int, frame: int, counters: Counters) -> Transfer:
        """Take a page that idle time has brought, and leave the frame in exchange."""
        transfer = self._ahead.pop((layer, expert))
        self._free[0].append(frame)
        counters.admissions += 1
        counters.count_page(transfer)
        return transfer

    def _ask(self, layer: int, page: int, cause: str) -> None:
        level, expert = divmod(page, self._experts)
        self._ahead[layer, page] = self._link.request(layer, expert, self._free[level].pop(), level, cause)

    def _release(self, transfer: Transfer) -> None:
        self._free[transfer.level].append(transfer.frame)

    def _lands_in_time(self, distance: int, began: float, level: int) -> bool:
        """Whether there is room for a page, and it would land before the layer at that distance needs it."""
        if not self._free[level] or self._layer_s is None or (speed := self._link.bytes_per_second) is None:
            return False
        latency = self._link.pacing.latency if self._link.pacing else 0.0
        needed_in = distance * self._layer_s - (perf_counter() - began)
        return lands_in_time(self._link.queued_bytes, self._page_bytes[level], speed, latency, needed_in)

    def drop(self, counters: Counters) -> None:
        """Drop every page, and wait for those that are moving."""
        for later in {later for later, _ in self._ahead}:
            self._discard(later, counters, (PREFETCH, BACKGROUND))
        self._predicted.clear()
        self._link.abandon()
        self._reclaim(counters)

    def reset(self, frames: Sequence[Sequence[int]]) -> None:
        """Begin anew with these frames of each level; nothing may be moving."""
        self._free, self._last_call = [list(each) for each in frames], None
        self._ahead.clear()
        self._dropped.clear()
        self._predicted.clear()

    def _discard(self, layer: int, counters: Counters, causes: Sequence[str] = (PREFETCH,)) -> None:
        """Take back what was staged for a layer, or let it land and be dropped."""
        for place in [place for place, each in self._ahead.items() if place[0] == layer and each.cause in causes]:
            transfer = self._ahead.pop(place)
            if self._link.cancel(transfer):
                counters.cancelled_prefetches += 1
                self._release(transfer)
            else:
                self._dropped.append(transfer)

    def _reclaim(self, counters: Counters) -> None:
        """Free the frames of dropped pages that have landed."""
        for transfer in [transfer for transfer in self._dropped if transfer.landed]:
            self._dropped.remove(transfer)
            self._release(transfer)
            if transfer.error is None:
                counters.wasted_prefetches += 1
                counters.count_page(transfer)
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
