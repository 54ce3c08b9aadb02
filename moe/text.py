"""The text to measure on, as a model's tokens, and whether tokenizer and model go together."""

from pathlib import Path
from pydoc_data import topics

import torch

from cachemoe.moe.models import load_tokenizer, outside
from cachemoe.moe.shape import MoeShape
from cachemoe.offload.errors import InputError

HELD_OUT = "pydoc_data.topics"


def held_out_text() -> bytes:
    """Prose of the Python language reference, from the standard library; no built-in model was trained on any of it."""
    return "\n\n".join(topics.topics[name].strip() for name in sorted(topics.topics)).encode()


def _content(path: Path | None) -> bytes:
    try:
        return held_out_text() if path is None else path.read_bytes()
    except OSError as error:
        raise InputError(f"the text {path} cannot be read: {error.strerror}") from error


def tokenized(path: Path | None, tokenizer, needed: int, from_end: bool = False) -> torch.Tensor:
    """Text as a model's tokens, from its start, or its end.

    Args:
        path: a text file in UTF-8; None for ``held_out_text``.
        tokenizer: the model's.
        needed: tokens that the measurement reads at most.

    Returns:
        ``[T]`` int64, T <= ``needed``.

    Raises:
        InputError: if the file cannot be read.
    """
    text = _content(path).decode(errors="replace")
    # No tokenizer makes less than a token of 16 characters of prose.
    part, kept = (slice(-16 * needed, None), slice(-needed, None)) if from_end else (slice(16 * needed), slice(needed))
    return torch.tensor(tokenizer(text[part], add_special_tokens=False, verbose=False)["input_ids"][kept])


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
    text = _content(path)
    if len(text) < needed:
        raise InputError(
            f"the text {path or HELD_OUT} has {len(text)} bytes, and this run needs {needed}: give a longer one"
        )
    return torch.tensor(list(text[:needed]))


def check_tokenizer(folder: Path) -> None:
    """Whether the checkpoint has one that transformers can load.

    Raises:
        InputError: if not.
    """
    if load_tokenizer(folder) is None:
        raise InputError(f"{folder} has no tokenizer: copy the model's tokenizer files into it")


def check_tokens(ids: torch.Tensor, shape: MoeShape) -> None:
    """Whether the model has every token that its tokenizer made of a text.

    Raises:
        InputError: if not, or if there is none.
    """
    if not ids.numel():
        raise InputError("the tokenizer makes no token of the text: give another")
    if (most := int(ids.max())) >= shape.vocabulary:
        raise InputError(
            f"the tokenizer gives token {most}, and the model has {shape.vocabulary}: it is another model's tokenizer"
        )


def windows_of(
    text: Path | None, tokenizer, tokens: int, context: int, shape: MoeShape, from_end: bool = False
) -> torch.Tensor:
    """``[windows, context]`` of the text, from its start or its end, as many as ``tokens`` and the text have.

    Raises:
        InputError: if that is none, the context is longer than the model's, or the tokenizer is not the model's.
    """
    longest = shape.context
    if tokens < context:
        raise InputError(f"--tokens {tokens} is less than one --context of {context}")
    if longest is not None and context > longest:
        raise InputError(f"--context {context} is more than the {longest} tokens that the model takes")
    with outside("the tokenizer fails on the text"):
        ids = tokenized(text, tokenizer, tokens // context * context, from_end)
    if len(ids) < context:
        raise InputError(f"{text or HELD_OUT} gives {len(ids)} tokens, less than one --context of {context}")
    check_tokens(ids, shape)
    count = len(ids) // context
    return ids[: count * context].view(count, context)
