"""What the commands on a user's own checkpoint do: quality and trace, from options to results."""

from collections.abc import Sequence
from pathlib import Path

import torch

from cachemoe.benchmarks.machine import describe
from cachemoe.benchmarks.quality import Evaluation, Setting, evaluate
from cachemoe.benchmarks.text import HELD_OUT, tokenized
from cachemoe.moe.checkpoint import MoeShape
from cachemoe.moe.hub import checkpoint_folder
from cachemoe.moe.layers import recorded_routers
from cachemoe.moe.load import load
from cachemoe.moe.models import load_tokenizer, outside
from cachemoe.moe.progress import Progress
from cachemoe.moe.sizes import slots_of
from cachemoe.moe.strategies import Strategy
from cachemoe.moe.trace import RoutingTrace
from cachemoe.offload.errors import InputError
from cachemoe.offload.residency import eviction_policy


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


def windows_of(text: Path | None, tokenizer, tokens: int, context: int, shape: MoeShape) -> torch.Tensor:
    """``[windows, context]`` of the text, as many as ``tokens`` and the text have.

    Raises:
        InputError: if that is none, the context is longer than the model's, or the tokenizer is not the model's.
    """
    longest = shape.context
    if tokens < context:
        raise InputError(f"--tokens {tokens} is less than one --context of {context}")
    if longest is not None and context > longest:
        raise InputError(f"--context {context} is more than the {longest} tokens that the model takes")
    with outside("the tokenizer fails on the text"):
        ids = tokenized(text, tokenizer, tokens // context * context)
    if len(ids) < context:
        raise InputError(f"{text or HELD_OUT} gives {len(ids)} tokens, less than one --context of {context}")
    check_tokens(ids, shape)
    count = len(ids) // context
    return ids[: count * context].view(count, context)


def run_quality(
    path: str,
    revision: str | None,
    text: Path | None,
    capacities: Sequence[str],
    strategies: Sequence[str],
    top_j: int,
    eviction: str,
    tokens: int,
    context: int,
    pool: str | None,
    format: str | None,
    progress: Progress,
) -> dict:
    """What each strategy costs at each capacity, stepped through a text: see ``evaluate``.

    Args:
        pool, format: of the engine that computes, exactly; the capacities are simulated beside it.

    Raises:
        InputError: for a checkpoint or options that cannot be.
    """
    evict, folder = eviction_policy(eviction), checkpoint_folder(path, revision)
    check_tokenizer(folder)
    model, tokenizer = load(folder, pool=pool, format=format, progress=progress)
    try:
        with outside(f"{path} cannot be computed in float32"):
            model.float()  # bfloat16 would round a batch of settings otherwise than the unmodified model alone
        shape, pooled = model.cachemoe.shape, model.cachemoe
        parsed = [Strategy.parse(each, shape.experts, shape.top_k, top_j) for each in strategies]
        parsed = list(dict.fromkeys([Strategy("original"), *parsed]))
        page = pooled.engine.page_format.page_bytes
        slots = [max(slots_of(each, shape, page)) for each in capacities]
        settings = [Setting(strategy, count) for count in dict.fromkeys(slots) for strategy in parsed]
        windows = windows_of(text, tokenizer, tokens, context, shape).to(model.device)
        failed = outside(f"{path} cannot be run on the text")
        with progress("quality, stepped through the text", len(windows)) as advance, failed:
            evaluation = evaluate(model, shape, windows, settings, evict, advance)
        name, pages = Path(model.name_or_path).resolve().name, pooled.engine.page_format.kind
    finally:
        model.cachemoe.close()
    return {
        "command": "quality",
        "model": {
            "name": name,
            "experts": shape.experts,
            "layers": len(shape.layers),
            "k": shape.top_k,
            "pages": pages,
        },
        "text": text.name if text else HELD_OUT,
        "context": context,
        "tokens": evaluation.unmodified.tokens,
        "eviction": eviction,
        "machine": describe(),
        "unmodified": {
            "nats_per_token": evaluation.unmodified.nats_per_token,
            "perplexity": evaluation.unmodified.perplexity,
        },
        "rows": _rows(settings, evaluation, shape.experts),
    }


def _rows(settings: Sequence[Setting], evaluation: Evaluation, experts: int) -> list[dict]:
    belady = {count: evaluation.belady_miss_rate(count) for count in {setting.capacity for setting in settings}}
    return [
        {
            "capacity": setting.capacity,
            "capacity_fraction": setting.capacity / experts,
            "strategy": str(setting.strategy),
            "label": setting.strategy.label,
            "top_j": setting.strategy.top_j,
            "miss_rate": quality.miss_rate,
            "belady_miss_rate": belady[setting.capacity],
            "nats_per_token": quality.nats_per_token,
            "perplexity": quality.perplexity,
            "perplexity_change": quality.perplexity_change(evaluation.unmodified),
            "kl_nats": quality.kl / quality.tokens,
            "top1_agreement": quality.agreements / quality.tokens,
        }
        for setting, quality in zip(settings, evaluation.settings, strict=True)
    ]


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
    folder = checkpoint_folder(path, revision)
    check_tokenizer(folder)
    model, tokenizer = load(folder, pool=pool, format=format, progress=progress)
    try:
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
    finally:
        model.cachemoe.close()
