"""One run of ``cachemoe calibrate``: a checkpoint and a text, and what policies have to know."""

from pathlib import Path

from cachemoe.moe.calibrate import calibrate
from cachemoe.moe.calibration import Calibration
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.leveled import cheaper_format, open_leveled
from cachemoe.moe.models import outside
from cachemoe.moe.progress import Progress
from cachemoe.moe.read_text import open_for_text
from cachemoe.moe.text import windows_of


def run_calibrate(
    path: str,
    revision: str | None,
    text: Path | None,
    tokens: int,
    context: int,
    pool: str | None,
    format: str | None,
    cheaper: str | None,
    progress: Progress,
) -> Calibration:
    """Calibrate a model with its own routing.

    Raises:
        InputError: for a checkpoint or options that cannot be.
    """
    with open_for_text(path, revision, pool, format, progress, in_float32=True) as (model, tokenizer):
        pooled, source = model.cachemoe, Checkpoint(model.name_or_path)
        windows = windows_of(text, tokenizer, tokens, context, pooled.shape, from_end=text is None)
        name, own = source.path.resolve().name, pooled.engine.page_format
        formats = [own, cheaper_format(source, own, cheaper)]
        capacity = [count.slots for count in pooled.layers]
        with (
            open_leveled(source, formats, capacity, progress, pooled.engine) as leveled,
            outside(f"{path} cannot be run on the text"),
        ):
            return calibrate(model, source, formats, leveled, windows, pooled.fingerprint, name, progress)
