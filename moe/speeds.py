"""How fast this machine reads weights and pages, each measured by the code that reads them in decode."""

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from secrets import token_hex
from statistics import mean, median
from time import perf_counter

import torch
import torch.nn.functional as F

from cachemoe.kernels.experts_cpu import experts
from cachemoe.kernels.formats import GROUPS, PageFormat
from cachemoe.kernels.rounded_cpu import KINDS, Rounded
from cachemoe.moe.pack import check_space
from cachemoe.moe.predict import Landing
from cachemoe.moe.progress import Progress
from cachemoe.offload.carriers import carrier_of
from cachemoe.offload.link import Link
from cachemoe.offload.pool import ExpertPool
from cachemoe.offload.store import UNKNOWN_MODEL, ExpertStore, StoreLayout, write_store

MOST_BYTES = 1 << 28  # that a measurement goes through: more than the caches of most processors hold
ROUNDS, REQUESTS = 5, 5  # of each number of pages: a token waits for many, so that slow ones count


@dataclass
class Reading:
    """Products that read weights, in turns, so that no cache holds what a model's own weights would not leave there.

    Args:
        runs: the products, each of weights of its own.
        size: bytes of each one's weights.
        call: such a product of next to no weights: its time is that of the call, which a model's layer has but once.
        seconds: of each product so far.
        call_seconds: of each call of next to no weights, one after each product.
    """

    runs: Sequence[Callable[[], object]]
    size: int
    call: Callable[[], object]
    seconds: list[float] = field(default_factory=list)
    call_seconds: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        run = self.runs[len(self.seconds) % len(self.runs)]
        start = perf_counter()
        run()
        read = perf_counter()
        self.call()
        self.seconds.append(read - start)
        self.call_seconds.append(perf_counter() - read)

    def speed(self, calls: int) -> float:
        """Bytes a second of so many products, those of a token: of the median token, without what the calls take."""
        tokens = [sum(self.seconds[first : first + calls]) for first in range(0, len(self.seconds), calls)]
        return calls * self.size / (median(tokens) - calls * median(self.call_seconds))

    def spent(self, first: int) -> float:
        """Seconds of all from the call of that number on."""
        return sum(self.seconds[first:]) + sum(self.call_seconds[first:])


def dense_reading(kind: str, columns: int, size: int, parts: int) -> Reading:
    """Products of one row with matrices that have ``size`` bytes in all, or ``MOST_BYTES`` if that is less.

    Args:
        kind: ``int8`` or ``int4``, as ``Rounded.times`` multiplies; or a dtype's name, as torch does.
        columns: of each matrix, about: a multiple of the largest group of int4.
        parts: matrices that the bytes are spread over.
    """
    columns = -(-columns // max(GROUPS)) * max(GROUPS)
    one = Rounded.size(1, columns, kind) if kind in KINDS else columns * getattr(torch, kind).itemsize
    rows = max(1, round(size / parts / one))
    parts = max(1, min(parts, MOST_BYTES // (rows * one)))
    least = Rounded.of(torch.ones(1, columns), kind) if kind in KINDS else torch.ones(1, columns)
    if kind in KINDS:
        x, made = torch.ones(1, columns, dtype=torch.bfloat16), Rounded.of(torch.ones(rows, columns), kind)
        of = [replace(made, packed=made.packed.clone(), scales=made.scales.clone()) for _ in range(parts)]
        return Reading([partial(each.times, x) for each in of], rows * one, partial(least.times, x))
    x = torch.ones(1, columns, dtype=getattr(torch, kind))
    runs = [partial(F.linear, x, x.new_ones(rows, columns)) for _ in range(parts)]
    return Reading(runs, rows * one, partial(F.linear, x, least.to(x.dtype)))


def experts_reading(page_format: PageFormat, top_k: int, size: int, dtype: torch.dtype) -> Reading:
    """A token's experts of one layer, in a pool of ``size`` bytes, or of ``MOST_BYTES`` if that is less.

    Args:
        top_k: experts of a token.
        dtype: of the hidden states.

    Raises:
        InputError: if there is no memory for the pool.
    """
    calls = max(1, min(size, MOST_BYTES) // (top_k * page_format.page_bytes))
    small = replace(page_format, hidden=max(GROUPS), intermediate=max(GROUPS))
    runs = _experts_of(page_format, calls, top_k, dtype)
    return Reading(runs, top_k * page_format.weight_bytes, *_experts_of(small, 1, top_k, dtype))


def _experts_of(page_format: PageFormat, calls: int, top_k: int, dtype: torch.dtype) -> list[Callable[[], object]]:
    """Of each call K experts, in one pool."""
    hidden, rows = page_format.hidden, (2 if page_format.gated else 1) * page_format.intermediate
    pool = ExpertPool(calls * top_k, page_format)
    weights = {"gate_up": torch.ones(rows, hidden), "down": torch.ones(hidden, page_format.intermediate)}
    if page_format.bias:
        weights |= {"gate_up_bias": torch.zeros(rows), "down_bias": torch.zeros(hidden)}
    pool.pages[:] = page_format.pack(**weights)
    x = torch.ones(1, hidden, dtype=dtype)
    gates, out = torch.full((1, top_k), 1 / top_k), torch.empty_like(x)
    slots = torch.arange(calls * top_k).view(calls, 1, top_k)
    return [partial(experts, x, each, gates, pool.weights, page_format, out) for each in slots]


def page_landing(page_format: PageFormat, top_k: int, pages: int, folder: Path, progress: Progress) -> Landing:
    """How fast an engine's link brings pages from a file in that folder, which is gone afterwards.

    The pages are random bytes, those of a request anywhere in the file, and checked when they have come, as ``load``
    has it.

    Args:
        top_k: K, the most pages that a layer asks for at once.
        pages: that the model's store would have.

    Raises:
        InputError: if the folder has no room for the file, or memory none for K pages.
    """
    size = page_format.page_bytes
    pages = min(pages, max(top_k, MOST_BYTES // size))
    layout = StoreLayout(UNKNOWN_MODEL, 1, pages, page_format)
    counts, draw = sorted({1, min(2, top_k), top_k}), random.Random(0)
    check_space(folder, pages * size)
    path = folder / f"speed-{token_hex(8)}.safetensors"
    generator = torch.Generator().manual_seed(0)
    with progress("measuring the disk", pages + len(counts) * ROUNDS * REQUESTS) as advance:
        made = (torch.randint(256, (size,), dtype=torch.uint8, generator=generator) for _ in range(pages))
        try:
            write_store(path, layout, made, advance)
            store = ExpertStore(path)
        finally:  # what is open stays readable, and nothing is left behind however this ends
            with suppress(OSError):
                path.unlink()
        times = {count: [] for count in counts}
        with store, Link([carrier_of(store, pool := ExpertPool(top_k, page_format))]) as link:
            pool.pages.zero_()  # memory is there before the clock runs

            def request(count: int) -> float:
                chosen = draw.sample(range(pages), count)
                asked = [link.request(0, page, frame) for frame, page in enumerate(chosen)]
                start = perf_counter()
                for _ in link.landed(asked):
                    pass
                seconds = perf_counter() - start
                advance()
                return seconds

            for _ in range(ROUNDS):
                for count in counts:
                    times[count].append(mean(request(count) for _ in range(REQUESTS)))
        return Landing({count: median(each) for count, each in times.items()}, store.direct)
