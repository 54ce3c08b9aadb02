"""Checkpoints into stores: every expert as a page, one expert in memory at a time."""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from cachemoe.kernels.cache_folder import cache_directory, make_folder
from cachemoe.kernels.formats import FLOATS, PageFormat
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.fingerprint import Fingerprint, checkpoint_key, fingerprint, keep
from cachemoe.moe.progress import Progress
from cachemoe.offload.errors import InputError
from cachemoe.offload.files import remove_orphans
from cachemoe.offload.store import VERSION, ExpertStore, StoreLayout, write_store

LONGEST_FOLDER = 100  # bytes of a checkpoint folder's name in its store's


def pack(
    checkpoint, layout: StoreLayout, path: Path, progress: Progress, wanted: Callable[[], bool] = lambda: True
) -> list[float] | None:
    """Write a checkpoint's store; it appears under its name only when complete.

    Args:
        checkpoint: a ``Checkpoint``, or ``ModelExperts``.
        layout: as its ``layout`` gives it.
        progress: shows the work.
        wanted: asked when nobody else writes the file any more: if not, it stays as it is.

    Returns:
        Of each MoE layer the relative error that rounding brings, root mean square of the difference over that of the
        weights; None where the pages hold the weights as they are.

    Raises:
        InputError: if the checkpoint lacks a tensor, or the disk has no room; nothing is left behind.
    """
    page_format, count = layout.page_format, layout.layers * layout.experts
    made = Fingerprint(checkpoint)
    squares = torch.zeros(layout.layers, 2, dtype=torch.float64)  # of the difference, and of the weights

    def pages() -> Iterator[torch.Tensor]:
        if not wanted():
            raise _NotWanted
        check_space(path.parent, count * page_format.page_bytes)
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
        checkpoint.check_unchanged()

    with progress(f"packing {count} experts", count) as advance:
        try:
            write_store(path, replace(layout, model=made), pages(), advance)
        except _NotWanted:
            return None
    if isinstance(checkpoint, Checkpoint):
        keep(checkpoint, str(made))
    if not rounds(page_format, checkpoint.dtype):
        return None
    return [math.sqrt(error / max(weights, 1e-300)) for error, weights in squares.tolist()]


class _NotWanted(Exception):
    """The store has come meanwhile."""


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
    path = stored_path(checkpoint, f"{page_format.kind}{page_format.group or ''}-v{VERSION}")

    def made() -> ExpertStore | None:
        if path.exists():
            with ExitStack() as stack:
                store = stack.enter_context(ExpertStore(path, check_reads=check_reads))
                if holds(store, checkpoint, layout, progress):
                    stack.pop_all()
                    return store
        return None

    def wanted() -> bool:  # asked when another thread or process, that packed meanwhile, has ended
        if (store := made()) is not None:
            store.close()
        return store is None

    if (store := made()) is None:
        pack(checkpoint, layout, path, progress, wanted)
        store = ExpertStore(path, check_reads=check_reads)
    return store


def stored_path(checkpoint: Checkpoint, what: str) -> Path:
    """Where in the cache directory something made of a checkpoint is kept.

    Raises:
        InputError: if there can be no such directory.
    """
    folder = os.fsencode(checkpoint.path.resolve().name)[:LONGEST_FOLDER].decode(errors="ignore")
    return store_directory() / f"{folder}-{checkpoint_key(checkpoint)}-{what}.safetensors"


def holds(store: ExpertStore, checkpoint: Checkpoint, layout: StoreLayout, progress: Progress) -> bool:
    """Whether a store holds a checkpoint's experts in this layout, with every byte of their weights.

    Raises:
        InputError: as ``fingerprint``.
    """
    alike = replace(store.layout, model=layout.model) == layout
    return alike and store.layout.model == fingerprint(checkpoint, progress)


def store_directory() -> Path:
    """``cache_directory``, where users come in, without what packings that were killed have left there.

    Raises:
        InputError: if there can be none.
    """
    try:
        remove_orphans(cache_directory(), "*.safetensors")
        return cache_directory()
    except OSError as error:
        raise InputError(str(error)) from error


def check_space(directory: Path, needed: int) -> None:
    """Whether a store of that many bytes can be made there.

    Raises:
        InputError: if the directory cannot be made, or its disk has less room.
    """
    try:
        make_folder(directory)
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
