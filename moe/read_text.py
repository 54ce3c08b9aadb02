"""A checkpoint opened to be run on a text, exactly: what quality, trace and calibrate begin with."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

from cachemoe.moe.hub import checkpoint_folder
from cachemoe.moe.load import load
from cachemoe.moe.models import outside
from cachemoe.moe.progress import Progress
from cachemoe.moe.text import check_tokenizer


@contextmanager
def open_for_text(
    path: str, revision: str | None, pool: str | None, format: str | None, progress: Progress, in_float32: bool
) -> Iterator[tuple]:
    """The model, with its own routing, and its tokenizer; closed at the end.

    Args:
        path, revision, pool, format, progress: as for ``load``.
        in_float32: bfloat16 would round a batch of settings otherwise than the unmodified model alone.

    Raises:
        InputError: as ``load``, or if the checkpoint has no tokenizer, or is not to be had in float32.
    """
    folder = checkpoint_folder(path, revision)
    check_tokenizer(folder)
    model, tokenizer = load(folder, pool=pool, format=format, progress=progress)
    with closing(model.cachemoe):
        if in_float32:
            with outside(f"{path} cannot be computed in float32"):
                model.float()
        yield model, tokenizer
