"""Sizes in bytes, and of pools, as people write them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cachemoe.moe.shape import MoeShape
from cachemoe.offload.errors import InputError

UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_of(text: str) -> float:
    """Bytes, from a text such as ``6GiB``.

    Raises:
        InputError: if it is none.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*([a-z]+)", text.strip(), re.IGNORECASE)
    if match is None or match[2].upper() not in UNITS:
        raise InputError(f"{text!r} is no size such as 6GiB or 800MB")
    return float(match[1]) * UNITS[match[2].upper()]


def size_text(count: float) -> str:
    """Three digits and a decimal unit."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 999.5 else f"{count:.0f} GB"


def layer_slots(text: str, experts: int) -> int | None:
    """Slots of a layer of E experts, from ``30`` or ``50%``; None for any other text."""
    if re.fullmatch(r"\d{1,18}", text):
        return int(text)
    share = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*%", text)
    return round(float(share[1]) / 100 * experts) if share else None


def slots_of(pool: str | int | None, shape: MoeShape, page_bytes: int) -> list[int]:
    """Slots of each MoE layer.

    Args:
        pool: as ``load`` takes it; None: half of the experts, or K where half are fewer. Of a size in bytes as many
            pages as fit, spread evenly, the first layers one more.

    Raises:
        InputError: if it is none of these, or less than the K experts of a token in a layer.
    """
    layers, experts, k = len(shape.layers), shape.experts, shape.top_k
    if pool is None:
        return [max(round(experts / 2), k)] * layers
    text = str(pool).strip()
    if (count := layer_slots(text, experts)) is not None:
        slots = [count] * layers
    else:
        try:
            pages = min(int(size_of(text) / page_bytes), layers * experts)
        except InputError as error:
            raise InputError(f"a pool is a share such as 50%, slots of each layer, or a size: {error}") from error
        slots = [pages // layers + (layer < pages % layers) for layer in range(layers)]
    if not k <= min(slots) <= max(slots) <= experts:
        least, most = (size_text(layers * count * page_bytes) for count in (k, experts))
        raise InputError(
            f"a pool of {text} is {min(slots)} experts a layer: it must lie between the {k} that a token uses, {least} "
            f"in all layers, and the {experts} that there are, {most}"
        )
    return slots


@dataclass(frozen=True)
class LevelBytes:
    """What levels take.

    Args:
        pages: of each level that has pages, the bytes of one, full precision first.
        surrogates: by their rank, the bytes of a layer's surrogates.
    """

    pages: Sequence[int] = (1,)
    surrogates: Mapping[int, int] = field(default_factory=dict)


def split_pool(
    slots: list[int], strategy, level_bytes: LevelBytes, experts: int, top_k: int
) -> tuple[list[int], list[int]]:
    """The slots of each level, in no more memory than ``slots`` of each layer for full precision would take.

    Args:
        slots: of each layer.
        strategy: whose rule says what share of the bytes cheaper levels have, and whether the layers share a cache.
        level_bytes: of each level.
        experts: E, of a layer.
        top_k: experts that a token may choose of a layer.

    Returns:
        The slots for full precision of each layer, or one number of a cache that they share; and those of each cache
        for each cheaper level that has pages.

    Raises:
        InputError: if that leaves a level less than a token may ask of it.
    """
    rule, layers, cheaper = strategy.rule, len(slots), []
    caches = 1 if rule.shared else layers
    page_bytes = level_bytes.pages[: 1 if rule.resident else 1 + rule.cheaper]
    if not rule.resident and len(page_bytes) <= rule.cheaper:
        raise ValueError(f"{rule.name} asks for a cheaper level, and the bytes of {len(page_bytes)} are given")
    for size in page_bytes[1:]:
        share = rule.share / (len(page_bytes) - 1)
        cheaper.append(min(int(sum(slots) * page_bytes[0] * share / size / caches), experts * layers // caches))
    taken = sum(count * size for count, size in zip(cheaper, page_bytes[1:], strict=True))
    if rule.resident:
        taken += level_bytes.surrogates[strategy.value]
    if rule.shared:
        full = [min(int((sum(slots) * page_bytes[0] - taken) / page_bytes[0]), experts * layers)]
    else:
        full = [int((count * page_bytes[0] - taken) / page_bytes[0]) for count in slots]
    if (least := max(0, min(*full, *cheaper, experts * layers))) < top_k:
        raise InputError(
            f"{rule.name} would have {least} slots for one of its levels, and a token may need {top_k}: "
            "choose a larger pool"
        )
    return full, cheaper
