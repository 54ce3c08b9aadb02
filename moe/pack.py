"""Checkpoints into stores: every expert as a page, one expert in memory at a time."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from cachemoe.kernels.compile_c import cache_directory
from cachemoe.kernels.formats import FLOATS, PageFormat
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.fingerprint import Fingerprint, checkpoint_key, fingerprint, keep
from cachemoe.moe.progress import Progress
from cachemoe.offload.errors import InputError
from cachemoe.offload.store import VERSION, ExpertStore, StoreLayout, write_store


def pack(checkpoint, layout: StoreLayout, path: Path, progress: Progress) -> list[float] | None:
    """Write a checkpoint's store; it appears under its name only when complete.

    Args:
        checkpoint: a ``Checkpoint``, or ``ModelExperts``.
        layout: as its ``layout`` gives it.
        progress: shows the work.

    Returns:
        Of each MoE layer the relative error that rounding brings, root mean square of the difference over that of the
        weights; None where the pages hold the weights as they are.

    Raises:
        InputError: if the checkpoint lacks a tensor, or the disk has no room; nothing is left behind.
    """
    page_format, count = layout.page_format, layout.layers * layout.experts
    made = Fingerprint(checkpoint)
    check_space(path.parent, count * page_format.page_bytes)
    squares = torch.zeros(layout.layers, 2, dtype=torch.float64)  # of the difference, and of the weights

    def pages() -> Iterator[torch.Tensor]:
        for layer in range(layout.layers):
            for e in range(layout.experts):
                weights = checkpoint.expert(layer, e)
                made.add(weights)
                page = page_format.pack(**weights)
                if rounds(page_format, checkpoint.dtype):
                    views = page_format.views(page)
                    for name in ("gate_up", "down"):
                        weight = weights[name].float()
                        rounded = page_format.dequantized(views, name)
                        squares[layer] += torch.stack(((weight - rounded).square().sum(), weight.square().sum()))
                yield page

    def finish() -> str:
        checkpoint.check_unchanged()
        return made.text()

    with progress(f"packing {count} experts", count) as advance:
        write_store(path, layout, pages(), advance, finish)
    if isinstance(checkpoint, Checkpoint):
        keep(checkpoint, made.text())
    if not rounds(page_format, checkpoint.dtype):
        return None
    return [math.sqrt(error / max(weights, 1e-300)) for error, weights in squares.tolist()]


def rounds(page_format: PageFormat, dtype: torch.dtype) -> bool:
    """Whether pages hold weights of that dtype in less precision."""
    return FLOATS.get(page_format.kind) not in (dtype, torch.float32)


def open_packed(
    checkpoint: Checkpoint, layout: StoreLayout, progress: Progress, check_reads: bool = True
) -> ExpertStore:
    """The checkpoint's store in the cache directory, made if it is not there or the checkpoint has changed since.

    Args:
        layout: as its ``layout`` gives it.
        check_reads: see ``ExpertStore``.

    Raises:
        InputError: as ``pack``, or if the file there is damaged.
    """
    page_format = layout.page_format
    kind = f"{page_format.kind}{page_format.group or ''}"
    folder = checkpoint.path.resolve().name
    path = cache_directory() / f"{folder}-{checkpoint_key(checkpoint)}-{kind}-v{VERSION}.safetensors"
    if path.exists():
        store = ExpertStore(path, check_reads=check_reads)
        if holds(store, checkpoint, layout, progress):
            return store
        store.close()
    pack(checkpoint, layout, path, progress)
    return ExpertStore(path, check_reads=check_reads)


def holds(store: ExpertStore, checkpoint: Checkpoint, layout: StoreLayout, progress: Progress) -> bool:
    """Whether a store holds a checkpoint's experts in this layout, with every byte of their weights.

    Raises:
        InputError: as ``fingerprint``.
    """
    alike = replace(store.layout, model=layout.model) == layout
    return alike and store.layout.model == fingerprint(checkpoint, progress)


def check_space(directory: Path, needed: int) -> None:
    """Whether a store of that many bytes can be made there.

    Raises:
        InputError: if the directory cannot be made, or its disk has less room.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise InputError(
            f"the folder {directory} cannot be made ({error.strerror}): choose another, or set CACHEMOE_CACHE where "
            "stores are kept"
        ) from error
    if free < needed * 1.05:
        raise InputError(
            f"the store needs {needed / 1e9:.2f} GB and {directory} has {free / 1e9:.2f} GB free: make room, or choose "
            "another disk (CACHEMOE_CACHE, where it is the cache directory)"
        )
