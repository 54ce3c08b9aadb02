"""What a checkpoint needs, from its headers alone: nothing of its weights is read."""

from dataclasses import dataclass

from cachemoe.kernels.formats import FLOATS, GROUPED
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.offload.errors import InputError


@dataclass(frozen=True)
class FormatNeeds:
    """One page format's sizes, in bytes.

    Args:
        kind: of the pages.
        page: one expert's.
        experts: all pages.
        read_per_token: what computing a token's experts reads, in all layers.
        fits: experts of a layer that fit beside the rest of the model into the memory given; None without one.
        fetched_per_token: what a token then fetches if its experts were missing as often as any; routing with
            favourites fetches less. None where no pool fits.
    """

    kind: str
    page: int
    experts: int
    read_per_token: int
    fits: int | None
    fetched_per_token: int | None


@dataclass(frozen=True)
class Needs:
    """A checkpoint's sizes.

    Args:
        dense: bytes of everything but the experts.
        formats: for each page format that its experts fit into, the checkpoint's own precision first.
    """

    dense: int
    formats: list[FormatNeeds]


def needs(checkpoint: Checkpoint, memory: float | None = None) -> Needs:
    """What the checkpoint needs in each page format.

    Args:
        memory: bytes to be had for the pool and the rest of the model.
    """
    shape, entries = checkpoint.shape, checkpoint.tensors.entries
    dense = sum(entry.bytes for name, entry in entries.items() if not checkpoint.is_expert(name))
    layers = len(shape.layers)
    own = next((kind for kind, dtype in FLOATS.items() if dtype == checkpoint.dtype), None)
    rows = []
    for kind in filter(None, (own, "int8", *GROUPED)):
        try:
            page_format = checkpoint.page_format(kind)
        except InputError:  # groups that H and I do not fit
            continue
        page = page_format.page_bytes
        fits = fetched = None
        if memory is not None:
            fits = min(max(0, int((memory - dense) // (page * layers))), shape.experts)
            if fits >= shape.top_k:
                fetched = round(layers * shape.top_k * (1 - fits / shape.experts) * page)
        everything = layers * shape.experts * page
        rows.append(FormatNeeds(kind, page, everything, layers * shape.top_k * page_format.weight_bytes, fits, fetched))
    return Needs(dense, rows)
