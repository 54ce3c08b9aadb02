"""What the engine moves and computes: the model's own pages, or pages of a larger model's geometry."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from cachemoe.benchmarks.geometries import GEOMETRIES
from cachemoe.kernels.formats import PageFormat
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.low_rank import Factored, LowRank
from cachemoe.moe.pack import check_space, open_packed, store_directory
from cachemoe.moe.progress import Progress
from cachemoe.offload.errors import InputError
from cachemoe.offload.pinned import PinnedLevel, PinnedStore
from cachemoe.offload.store import VERSION, ExpertStore, Store, StoreLayout, write_store

NATIVE = "native"
FILE, PINNED = "file", "pinned"
# Pages of a real model's geometry hold random weights, one page for each of the routing model's experts.
PAYLOAD_FORMATS = {"qwen1.5-moe": GEOMETRIES["qwen1.5-moe"].page_format("int4")}
PAYLOADS = (NATIVE, *PAYLOAD_FORMATS)


def payload_format(name: str, checkpoint: Checkpoint, kind: str | None = None) -> PageFormat:
    """The payload's pages.

    Args:
        kind: their format, of a cheaper level; None: the payload's own.

    Raises:
        InputError: for an unknown payload, or experts that do not fit into such pages.
    """
    if name not in PAYLOADS:
        raise InputError(f"unknown payload {name!r}: choose among {', '.join(PAYLOADS)}")
    if name == NATIVE:
        return checkpoint.page_format(kind)
    return PAYLOAD_FORMATS[name] if kind is None else GEOMETRIES[name].page_format(kind)


def open_payload(name: str, checkpoint: Checkpoint, progress: Progress, kind: str | None = None) -> ExpertStore:
    """The payload's store, made in the cache directory if it is not there.

    Args:
        name: one of ``PAYLOADS``.
        checkpoint: the routing model.
        progress: shows the making of the store.
        kind: as for ``payload_format``.

    Raises:
        InputError: for an unknown payload, too little free space, or a store that cannot be written or opened.
    """
    page_format = payload_format(name, checkpoint, kind)
    if name == NATIVE:
        return open_packed(checkpoint, checkpoint.layout(kind), progress)
    shape = checkpoint.shape
    layout = StoreLayout(f"random {name}", len(shape.layers), shape.experts, page_format)
    count = layout.layers * layout.experts
    made = "" if kind is None else f"-{kind}"
    file = f"{name}-{layout.model.replace(' ', '-')}-{layout.layers}x{layout.experts}{made}-v{VERSION}.safetensors"
    path = store_directory() / file
    if not path.exists():
        check_space(path.parent, count * layout.page_format.page_bytes)
        with progress(f"making the {name} store", count) as advance:
            write_store(path, layout, random_pages(layout), advance)
    return ExpertStore(path, expected=layout)


def check_level(name: str, device: str, pages: int) -> None:
    """Whether ``open_level`` would know the name, and the device can be fed from it.

    Args:
        pages: that the store has.

    Raises:
        InputError: if not.
    """
    kind, _, size = name.partition(":")
    if (kind, size) != (FILE, "") and not (kind == PINNED and (not size or size.isdecimal())):
        raise InputError(f"--store is file, pinned or pinned:PAGES, as in pinned:100, not {name!r}")
    if size and not 1 <= int(size) <= pages:
        raise InputError(f"--store {name}: the pinned level must have between 1 page and the store's {pages}")
    if kind == FILE and device == "cuda":
        raise InputError("a GPU is fed from pinned memory: use --store pinned, or pinned:PAGES for a bounded level")


def open_level(name: str, file: ExpertStore, progress: Progress) -> AbstractContextManager[Store]:
    """The store that pages move from: the ``file`` itself, ``pinned``, or ``pinned:PAGES`` of it over the file.

    Raises:
        InputError: if the memory cannot be had or locked.
    """
    kind, _, size = name.partition(":")
    if kind == FILE:
        return nullcontext(file)
    if size:
        return PinnedLevel(file, int(size))
    with progress("reading every page into pinned memory", file.pages) as advance:
        return PinnedStore(file, advance)


def random_pages(layout: StoreLayout) -> Iterator[torch.Tensor]:
    """int4 or int2 pages of random weights, the same at every call, of a size that keeps activations finite."""
    page_format = layout.page_format
    size = page_format.page_bytes
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (2 * size,), dtype=torch.uint8, generator=generator)
    for index in range(layout.layers * layout.experts):
        start = index * 7919 % size  # another stretch of the noise for each page: drawing it anew would take minutes
        page = noise[start : start + size].clone()
        for view in page_format.views(page).values():
            if view.dtype == torch.bfloat16:  # scales and zeros
                view[..., 0] = page_format.hidden**-0.5 / 4
                view[..., 1] = 0.0
        yield page


def payload_surrogates(
    name: str, checkpoint: Checkpoint, surrogates: Mapping[int, Sequence[LowRank]]
) -> Mapping[int, Sequence[LowRank]]:
    """The model's own surrogates, or random ones of the payload's geometry with residuals as large beside its pages.

    The base is a whole matrix in bfloat16, whatever the format of the payload's pages.

    Args:
        surrogates: the model's, by their rank, of each layer.
    """
    if name == NATIVE:
        return surrogates
    own, payload = checkpoint.page_format(None), payload_format(name, checkpoint)
    generator, made = torch.Generator().manual_seed(0), {}
    for rank, layers in surrogates.items():
        factors = (t for m in (layers[0].gate_up, layers[0].down) for t in (m.left, m.right))
        residuals = sum(t.numel() * t.element_size() for t in factors)
        matrices = {
            "gate_up": (2 * payload.intermediate, payload.hidden),
            "down": (payload.hidden, payload.intermediate),
        }
        of_rank = checkpoint.shape.experts * sum(2 * sum(size) for size in matrices.values())
        fitting = max(1, int(residuals / own.page_bytes * payload.page_bytes / of_rank))
        factored = {n: _random(*size, fitting, checkpoint.shape.experts, generator) for n, size in matrices.items()}
        made[rank] = [LowRank(**factored, biases={}, page_format=payload)] * len(layers)
    return made


def _random(rows: int, columns: int, rank: int, experts: int, generator: torch.Generator) -> Factored:
    """Factors that keep activations finite; each layer's are the same memory."""
    base, left, right = (
        (torch.rand(shape, generator=generator) - 0.5).mul_(2 * shape[-1] ** -0.5).bfloat16()
        for shape in ((rows, columns), (experts, rows, rank), (experts, rank, columns))
    )
    return Factored(base, left, right)
