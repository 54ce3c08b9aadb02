"""The low-rank surrogates of a checkpoint's experts, made once and kept in the cache directory beside its stores."""

from collections.abc import Sequence

import torch

from cachemoe.kernels.formats import PageFormat
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.fingerprint import fingerprint
from cachemoe.moe.low_rank import Factored, LowRank, aligned, low_rank
from cachemoe.moe.pack import stored_path
from cachemoe.moe.progress import Progress
from cachemoe.moe.tensor_file import load_tensors, save_tensors
from cachemoe.offload.errors import InputError

SURROGATES_VERSION = 1
MATRICES, PARTS = ("gate_up", "down"), ("base", "left", "right")
BIASES = ("gate_up_bias", "down_bias")


def open_surrogates(checkpoint: Checkpoint, rank: int, progress: Progress) -> list[LowRank]:
    """The surrogates of each layer, from the cache directory, or made and put there.

    All experts of a layer are in memory while its surrogates are made. The mean has each expert alike.

    Args:
        rank: of the residuals.
        progress: shows the making.

    Raises:
        InputError: if the rank is above the matrices', or the file there is damaged, or cannot be written.
    """
    page_format = checkpoint.page_format(None)
    most = max(min(shape) for _, _, _, _, shape in page_format.parts if len(shape) == 2)
    if not 0 <= rank <= most:
        raise InputError(f"the residuals of these experts have ranks of 0 to {most}, and {rank} was asked for")
    path, made_of = stored_path(checkpoint, f"lowrank{rank}-v{SURROGATES_VERSION}"), fingerprint(checkpoint, progress)
    layers = range(len(checkpoint.shape.layers))
    parts = [f"{matrix}.{part}" for matrix in MATRICES for part in PARTS] + list(BIASES if page_format.bias else ())
    if path.exists():
        names = [f"{layer}.{part}" for layer in layers for part in parts]
        tensors, about = load_tensors(path, "surrogates", SURROGATES_VERSION, {"model": str}, names)
        if about["model"] == made_of:
            return [_of_tensors(tensors, layer, page_format) for layer in layers]
    surrogates = []
    with progress(f"factoring {len(layers)} layers of experts", len(layers)) as advance:
        for layer in layers:
            experts = [checkpoint.expert(layer, e) for e in range(checkpoint.shape.experts)]
            weights = {name: torch.stack([each[name] for each in experts]) for name in experts[0]}
            alike = torch.ones(len(experts))
            surrogates.append(low_rank(aligned(weights, alike, page_format), alike, rank, page_format))
            advance()
    checkpoint.check_unchanged()
    tensors = {f"{layer}.{name}": each for layer in layers for name, each in _tensors(surrogates[layer]).items()}
    try:
        save_tensors(path, "surrogates", {"version": SURROGATES_VERSION, "model": made_of}, tensors)
    except OSError as error:
        raise InputError(f"the surrogates cannot be written to {path} ({error}): make room there") from error
    return surrogates


def bytes_of(surrogates: Sequence[LowRank]) -> int:
    """Of the largest layer's: what each layer's surrogates take of a pool."""
    return max(each.bytes for each in surrogates)


def _tensors(surrogate: LowRank) -> dict[str, torch.Tensor]:
    matrices = {f"{name}.{part}": getattr(getattr(surrogate, name), part) for name in MATRICES for part in PARTS}
    return matrices | surrogate.biases


def _of_tensors(tensors: dict[str, torch.Tensor], layer: int, page_format: PageFormat) -> LowRank:
    factored = {name: Factored(*(tensors[f"{layer}.{name}.{part}"] for part in PARTS)) for name in MATRICES}
    biases = {name: tensors[f"{layer}.{name}"] for name in BIASES if page_format.bias}
    return LowRank(**factored, biases=biases, page_format=page_format)
