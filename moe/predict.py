"""How long a token takes in decode: arithmetic on a model's sizes, a machine's speeds and a share of misses.

A token reads all weights but the experts', and of each MoE layer those of K experts, at the speeds at which the
products themselves read memory. To that comes what it takes beside weights, measured on a model that has next to none.

In a layer with n misses all n pages are asked for at once, and the K - n hits are computed while they move; a page is
computed when it has landed and what came before it is done. So the hits or the first page, whichever is later, then the
first page's product or the second page, and so on: ``expert_seconds`` steps through it. Which experts miss is taken to
be independent, each with the miss rate's chance: n is binomial.

What is left out makes the true time longer: reading threads and products take memory's bandwidth and cores from each
other, attention over a long context reads keys and values, and misses that come in crowds leave less to overlap.
"""

from dataclasses import dataclass
from math import comb

import numpy as np


@dataclass(frozen=True)
class TokenSizes:
    """What a token reads and moves.

    Args:
        layers: MoE layers.
        top_k: K, experts that a token uses in each.
        page_bytes: that a miss moves.
        weight_bytes: that computing with an expert reads.
        dense: bytes of all other weights that a token reads, by the kind of product that reads them.
    """

    layers: int
    top_k: int
    page_bytes: int
    weight_bytes: int
    dense: dict[str, int]

    @property
    def memory_bytes(self) -> int:
        """Bytes of weights that a token reads from memory."""
        return sum(self.dense.values()) + self.layers * self.top_k * self.weight_bytes

    def disk_bytes(self, miss_rate: float) -> float:
        """Bytes that a token reads from the disk, on average."""
        return self.layers * self.top_k * miss_rate * self.page_bytes


@dataclass(frozen=True)
class Landing:
    """How fast pages come from a disk.

    Args:
        seconds: by how many pages are asked for at once, one at least: from when all are until the last has landed.
        direct: whether they were read past the system's page cache.
    """

    seconds: dict[int, float]
    direct: bool

    def of(self, pages: int) -> float:
        """Seconds until the last of so many pages has landed: what was measured, or the line between two counts."""
        counts = sorted(self.seconds)
        return float(np.interp(pages, counts, [self.seconds[count] for count in counts]))


@dataclass(frozen=True)
class Speeds:
    """What a machine has been measured to do.

    Args:
        dense: bytes a second at which products read weights, by their kind.
        experts: bytes a second at which a token's experts read their weights.
        landing: of pages.
        token_s: seconds of a token whose experts all hit, beside reading weights.
        missing_s: seconds more of a layer with misses: of asking for pages, not of waiting.
    """

    dense: dict[str, float]
    experts: float
    landing: Landing
    token_s: float
    missing_s: float


def expert_seconds(misses: int, sizes: TokenSizes, speeds: Speeds) -> float:
    """Seconds of one layer's experts for a token, of which so many miss."""
    one = sizes.weight_bytes / speeds.experts
    done = (sizes.top_k - misses) * one
    for page in range(1, misses + 1):
        done = max(done, speeds.landing.of(page)) + one
    return done + (speeds.missing_s if misses else 0.0)


def token_seconds(sizes: TokenSizes, speeds: Speeds, miss_rate: float) -> float:
    """Seconds of a token.

    Args:
        miss_rate: share of the selections that miss, 0 to 1.
    """
    dense = sum(size / speeds.dense[kind] for kind, size in sizes.dense.items())
    k, experts = sizes.top_k, 0.0
    for n in range(k + 1):
        chance = comb(k, n) * miss_rate**n * (1 - miss_rate) ** (k - n)
        experts += chance * expert_seconds(n, sizes, speeds)
    return speeds.token_s + dense + sizes.layers * experts
