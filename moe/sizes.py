"""Sizes in bytes as people write them."""

import re

from cachemoe.offload.errors import InputError

UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_of(text: str) -> float:
    """Bytes, from a text such as ``6GiB``.

    Raises:
        InputError: if it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip(), re.IGNORECASE)
    if match is None or match[2].upper() not in UNITS:
        raise InputError(f"{text!r} is no size such as 6GiB or 800MB (a pool may also be 50%, or slots of each layer)")
    return float(match[1]) * UNITS[match[2].upper()]


def size_text(count: float) -> str:
    """Three digits and a decimal unit."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 999.5 else f"{count:.0f} GB"
