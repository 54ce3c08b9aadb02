"""The text to measure on, as byte-level tokens."""

from pathlib import Path
from pydoc_data import topics

import torch

from cachemoe.offload.errors import InputError

HELD_OUT = "pydoc_data.topics"


def held_out_text() -> bytes:
    """Prose of the Python language reference, from the standard library; tinymoe was not trained on any of it."""
    return "\n\n".join(topics.topics[name].strip() for name in sorted(topics.topics)).encode()


def tokenized(path: Path | None, tokenizer, needed: int) -> torch.Tensor:
    """Text as a model's tokens, from its start.

    Args:
        path: a text file in UTF-8; None for ``held_out_text``.
        tokenizer: the model's.
        needed: tokens that the measurement reads at most.

    Returns:
        ``[T]`` int64, T <= ``needed``.

    Raises:
        InputError: if the file cannot be read.
    """
    try:
        text = (held_out_text() if path is None else path.read_bytes()).decode(errors="replace")
    except OSError as error:
        raise InputError(f"the text {path} cannot be read: {error.strerror}") from error
    # No tokenizer makes less than a token of 16 characters of prose.
    return torch.tensor(tokenizer(text[: 16 * needed], add_special_tokens=False, verbose=False)["input_ids"][:needed])


def load_tokens(path: Path | None, vocabulary: int, needed: int) -> torch.Tensor:
    """Text as tokens, one a byte.

    Args:
        path: a text file; None for ``held_out_text``.
        vocabulary: the model's; it must be 256, byte-level.
        needed: tokens that the measurement reads.

    Returns:
        ``[needed]`` int64, from the start of the text.

    Raises:
        InputError: if the model is not byte-level, the file cannot be read, or the text is too short.
    """
    if vocabulary != 256:
        raise InputError(f"this version measures byte-level models (256 tokens), and this one has {vocabulary} tokens")
    try:
        text = held_out_text() if path is None else path.read_bytes()
    except OSError as error:
        raise InputError(f"the text {path} cannot be read: {error.strerror}") from error
    if len(text) < needed:
        raise InputError(
            f"the text {path or HELD_OUT} has {len(text)} bytes, and this run needs {needed}: give a longer one"
        )
    return torch.tensor(list(text[:needed]))
