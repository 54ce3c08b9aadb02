"""What an engine counts."""

from dataclasses import dataclass, fields

from cachemoe.offload.link import BACKGROUND, PREFETCH, Transfer


@dataclass
class Counters:
    """Totals since the engine was made or the counters were replaced.

    A selection is one expert that one token chose and runs; one that the policy drops is none. It is a hit if the
    expert's page was in its slot when the token was routed, else a miss; in a call of many tokens an expert misses at
    most once. A miss whose page a prefetch had brought is a prefetch hit, one whose page a prefetch was still bringing
    a late prefetch; all others are demands.

    Attributes:
        calls: of a layer.
        selections: hits + misses.
        drops: experts chosen and not run.
        swaps: experts that ran in the place of one that the policy would have had.
        cheap: experts that ran at a cheaper level than full precision, and ``better``, those that a better level
            served than was asked for.
        pages_read: pages that have landed, whatever they were asked for by; ``bytes_read`` is their bytes,
            ``prefetched_bytes`` and ``background_bytes`` those of them that were asked for ahead, and in the link's
            idle time; ``cheap_bytes`` those of cheaper levels.
        admissions: experts that the link's idle time brought into a slot.
        predicted: experts that the prefetcher expected a layer to choose; ``predicted_right`` those that it chose.
        prefetches: pages asked for ahead; ``cancelled_prefetches`` those taken back before a byte had moved;
            ``wasted_prefetches`` those that moved and were not used; ``failed_prefetches`` those that could not be
            read.
        stall_s: seconds spent waiting for pages with nothing left to compute.
        compute_s: seconds in the experts.
        link_s: seconds with pages under way.
        engine_s: seconds in the engine, all of these included but the link's.
    """

    calls: int = 0
    selections: int = 0
    drops: int = 0
    swaps: int = 0
    cheap: int = 0
    better: int = 0
    hits: int = 0
    misses: int = 0
    pages_read: int = 0
    bytes_read: int = 0
    prefetched_bytes: int = 0
    background_bytes: int = 0
    cheap_bytes: int = 0
    admissions: int = 0
    predicted: int = 0
    predicted_right: int = 0
    prefetches: int = 0
    prefetch_hits: int = 0
    late_prefetches: int = 0
    cancelled_prefetches: int = 0
    wasted_prefetches: int = 0
    failed_prefetches: int = 0
    stall_s: float = 0.0
    compute_s: float = 0.0
    link_s: float = 0.0
    engine_s: float = 0.0

    def count_call(self, places: int, drops: int, misses: int, engine_s: float) -> None:
        """Add one call of so many chosen experts, of which ``drops`` did not run."""
        self.calls += 1
        self.selections += places - drops
        self.drops += drops
        self.hits += places - drops - misses
        self.misses += misses
        self.engine_s += engine_s

    def add(self, other: "Counters") -> None:
        """Add another's totals."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def count_page(self, transfer: Transfer) -> None:
        """Add a page that has landed."""
        size = transfer.carrier.page_bytes
        self.pages_read += 1
        self.bytes_read += size
        self.prefetched_bytes += size * (transfer.cause == PREFETCH)
        self.background_bytes += size * (transfer.cause == BACKGROUND)
        self.cheap_bytes += size * (transfer.level > 0)
