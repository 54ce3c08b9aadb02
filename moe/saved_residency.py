"""Who was resident, in a file: a new process begins where another has ended, instead of with an empty pool."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from cachemoe.kernels.state import Residency
from cachemoe.moe.tensor_file import load_tensors, save_tensors
from cachemoe.offload.errors import InputError
from cachemoe.offload.residency import resized

VERSION = 1
COUNTS = "last_use", "uses", "clock", "tokens"
DTYPES = {"page_of": torch.int64} | dict.fromkeys(COUNTS, torch.int64) | {"range_sum": torch.float64}


def check_plain(state: Residency) -> None:
    """Whether the caches are of one layer each, at one level, as a file has them.

    Raises:
        InputError: if not.
    """
    if state.shared or state.levels > 1:
        raise InputError("who is resident is saved of pools of one format, whose layers have caches of their own")


def save_residency(state: Residency, path: Path, model: str, name: str) -> None:
    """Write a file; it appears under its name only when complete.

    Args:
        state: ``[L, ...]``.
        model: fingerprint of the checkpoint. name: of it.

    Raises:
        InputError: for caches that are shared or have levels.
        OSError: if it cannot be written.
    """
    check_plain(state)
    tensors = {each: getattr(state, each) for each in DTYPES}
    save_tensors(path, "residency", {"version": VERSION, "model": model, "name": name}, tensors)


def read_residency(path: Path, state: Residency, evict: Callable, model: str) -> Residency:
    """The state of the file, with the slots that ``state`` has: where these are fewer, experts leave by the policy.

    Raises:
        InputError: if the file is missing or damaged, is of another model, or the caches are shared or have levels.
    """
    check_plain(state)
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no residency at {path}: model.cachemoe.save_residency makes one")
    tensors, about = load_tensors(path, "residency", VERSION, {"model": str, "name": str}, list(DTYPES))
    if about["model"] != model:
        raise InputError(f"{path} is of another model, {about['name']}, or of weights that it had before: save it anew")
    if not _can_be(tensors, *state.slot_of.shape):
        raise InputError(f"{path} is not a cachemoe residency, or damaged: save it anew")
    page_of = tensors["page_of"]
    saved = Residency.empty(torch.full((len(page_of),), page_of.shape[1]), state.experts)
    layers, slots = torch.nonzero(page_of >= 0, as_tuple=True)
    saved.slot_of[layers, page_of[layers, slots]] = slots
    return resized(replace(saved, **tensors), state.capacity, (), evict)


def _can_be(tensors: dict[str, torch.Tensor], layers: int, experts: int) -> bool:
    """Whether the tensors are those of so many layers and experts, and say nothing that cannot be."""
    page_of = tensors["page_of"]
    if any(tensors[name].dtype != dtype for name, dtype in DTYPES.items()) or page_of.dim() != 2:
        return False
    shapes = {name: (layers,) for name in DTYPES} | dict.fromkeys(("last_use", "uses"), (layers, experts))
    shapes["page_of"] = layers, page_of.shape[1]
    if (
        any(tuple(tensors[name].shape) != shape for name, shape in shapes.items())
        or not 1 <= page_of.shape[1] <= experts
    ):
        return False
    if any((tensors[name] < 0).any() for name in COUNTS) or (tensors["last_use"] > tensors["clock"][:, None]).any():
        return False
    if not tensors["range_sum"].isfinite().all() or page_of.min() < -1 or page_of.max() >= experts:
        return False
    return all(len(set(row)) == len(row) for row in ([e for e in pages if e >= 0] for pages in page_of.tolist()))
