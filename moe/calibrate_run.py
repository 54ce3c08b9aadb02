"""One run of ``cachemoe calibrate``: a checkpoint and a text, and what policies have to know."""

from contextlib import closing
from pathlib import Path

from cachemoe.moe.calibrate import calibrate
from cachemoe.moe.calibration import Calibration
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.hub import checkpoint_folder
from cachemoe.moe.load import load
from cachemoe.moe.models import outside
from cachemoe.moe.progress import Progress
from cachemoe.moe.text import check_tokenizer, windows_of


def run_calibrate(
    path: str,
    revision: str | None,
    text: Path | None,
    tokens: int,
    context: int,
    pool: str | None,
    format: str | None,
    progress: Progress,
) -> Calibration:
    """Calibrate a model with its own routing.

    Raises:
        InputError: for a checkpoint or options that cannot be.
    """
    folder = checkpoint_folder(path, revision)
    check_tokenizer(folder)
    model, tokenizer = load(folder, pool=pool, format=format, progress=progress)
    with closing(model.cachemoe):
        with outside(f"{path} cannot be computed in float32"):
            model.float()
        pooled = model.cachemoe
        windows = windows_of(text, tokenizer, tokens, context, pooled.shape, from_end=text is None)
        name, page_format = Path(model.name_or_path).resolve().name, pooled.engine.page_format
        with outside(f"{path} cannot be run on the text"):
            return calibrate(model, Checkpoint(folder), page_format, windows, pooled.fingerprint, name, progress)
