"""The names of checkpoints' tensors taken apart: which part of which layer's experts one is."""

import re
from dataclasses import dataclass

MOST_DIGITS = 6  # of a layer's or an expert's number
IMPOSSIBLE_NUMBER = re.compile(rf"(?:layers|experts)\.[0-9]{{{MOST_DIGITS + 1}}}")


@dataclass(frozen=True)
class Found:
    """A tensor's name taken apart: ``prefix`` up to the naming's part, ``stem`` up to ``layers.N.``."""

    prefix: str
    stem: str
    layer: int


def find(name: str, part: str) -> Found | None:
    """Take apart the name of a part's tensor, in any layer, of any expert; None for other names.

    In plain text operations, each of which reads the name once: names in a file may be of any length.
    """
    before, braces, after = part.partition("{}")
    if braces:
        if not name.endswith(after):
            return None
        name = name.removesuffix(after)
        bare = name.rstrip("0123456789")
        if _number(name[len(bare) :]) is None:
            return None
        name = bare
    if not name.endswith(before):
        return None
    prefix, end = name.removesuffix(before), len(name)
    if not prefix.endswith("."):
        return None
    while (start := prefix.rfind("layers.", 0, end)) >= 0:
        digits, dot, _ = prefix[start + 7 : start + 8 + MOST_DIGITS].partition(".")
        layer = _number(digits)
        if dot and layer is not None and (start == 0 or prefix[start - 1] == "."):
            return Found(prefix, prefix[:start], layer)
        end = start
    return None


def _number(digits: str) -> int | None:
    """The number of a layer or an expert; None for what no model writes as one: ``01`` is no second name of 1."""
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= MOST_DIGITS):
        return None
    return int(digits) if digits == "0" or not digits.startswith("0") else None
