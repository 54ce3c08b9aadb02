"""One run of ``cachemoe trace``: a model's own routing of a text, recorded."""

from pathlib import Path

import torch

from cachemoe.moe.layers import recorded_routers
from cachemoe.moe.models import outside
from cachemoe.moe.progress import Progress
from cachemoe.moe.read_text import open_for_text
from cachemoe.moe.text import windows_of
from cachemoe.moe.trace import RoutingTrace


@torch.inference_mode()
def run_trace(
    path: str,
    revision: str | None,
    text: Path | None,
    tokens: int,
    context: int,
    pool: str | None,
    format: str | None,
    progress: Progress,
) -> RoutingTrace:
    """Record the model's own routing of a text.

    Raises:
        InputError: for a checkpoint or options that cannot be.
    """
    with open_for_text(path, revision, pool, format, progress, in_float32=False) as (model, tokenizer):
        windows = windows_of(text, tokenizer, tokens, context, model.cachemoe.shape)
        logits, ids = [], []
        failed = outside(f"{path} cannot be run on the text")
        with progress("recording the routers", len(windows)) as advance, failed:
            for window in windows:
                with recorded_routers(model) as answers:
                    model(window[None].to(model.device))
                logits.append(torch.stack([answer.logits.half().cpu() for (answer,) in answers]))
                ids.append(torch.stack([answer.ids.short().cpu() for (answer,) in answers]))
                advance()
        return RoutingTrace(
            torch.cat(logits, 1),
            torch.cat(ids, 1),
            windows.flatten().int(),
            model.cachemoe.fingerprint,
            Path(model.name_or_path).resolve().name,
            context,
        )
