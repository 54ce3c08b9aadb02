"""What a pool has at the beginning: nobody, or the experts that a saved residency names; and the texts that follow."""

import argparse
from contextlib import closing
from pathlib import Path

import torch

from cachemoe.kernels.state import Residency
from cachemoe.moe.load import load
from cachemoe.moe.progress import Progress
from cachemoe.moe.text import load_tokens

PROSE, CODE = "prose", "source code"
TEXTS = {PROSE: None, CODE: Path(argparse.__file__)}  # files, as ``load_tokens`` takes them
SAVED = 256  # tokens at the start of a text after which residency is saved; what is measured comes later in the text


def saved_and_rest(text: str, vocabulary: int, needed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``SAVED`` tokens of one of ``TEXTS``, and the ``needed`` tokens that follow.

    Raises:
        InputError: as ``load_tokens``.
    """
    tokens = load_tokens(TEXTS[text], vocabulary, SAVED + needed)
    return tokens[:SAVED], tokens[SAVED:]


@torch.inference_mode()
def decode(model, tokens: torch.Tensor, past=None) -> None:
    """Feed tokens ``[T]`` one at a time.

    Args:
        past: keys and values of what came before, which grow; None: nothing came before.
    """
    for token in tokens:
        past = model(token[None, None], past_key_values=past, use_cache=True).past_key_values


def save_residency_after(folder: Path, tokens: torch.Tensor, path: Path, progress: Progress, **options) -> None:
    """Load a checkpoint, decode tokens ``[T]`` from an empty pool, and write who is then resident.

    Args:
        options: of ``load``.

    Raises:
        InputError: as ``load``.
        OSError: if the file cannot be written.
    """
    model, _ = load(folder, device="cpu", progress=progress, **options)
    with closing(model.cachemoe):
        decode(model, tokens)
        model.cachemoe.save_residency(path)


def start_over(model, state: Residency) -> None:
    """Let the pool hold whom ``state`` names, and count anew: what several measurements begin with.

    Args:
        state: the engine's, as it was when the model was loaded; it stays as it is.
    """
    model.cachemoe.engine.state = state.clone()
    model.cachemoe.engine.fill()
    model.cachemoe.reset_counters()
