"""One run of ``cachemoe quality``, from options to the report."""

from collections.abc import Sequence
from pathlib import Path

from cachemoe.moe.calibration import Calibration
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.free_running import FreeRun, prompts_of, run_freely
from cachemoe.moe.leveled import cheaper_format, open_leveled, ranks_of
from cachemoe.moe.machine import describe
from cachemoe.moe.models import outside
from cachemoe.moe.progress import Progress
from cachemoe.moe.quality import Evaluation, Setting, evaluate
from cachemoe.moe.read_text import open_for_text
from cachemoe.moe.shape import MoeShape
from cachemoe.moe.sizes import LevelBytes, slots_of
from cachemoe.moe.strategies import Strategy, kept
from cachemoe.moe.text import HELD_OUT, windows_of
from cachemoe.offload.residency import eviction_policy


def run_quality(
    path: str,
    revision: str | None,
    text: Path | None,
    capacities: Sequence[str],
    strategies: Sequence[str],
    top_j: int | None,
    eviction: str,
    tokens: int,
    context: int,
    pool: str | None,
    format: str | None,
    cheaper: str | None,
    calibration: Path | None,
    free: int,
    prompts: int,
    progress: Progress,
    miss_cost: float | None = None,
) -> dict:
    """What each strategy costs at each capacity, stepped through a text: see ``evaluate``.

    Args:
        pool, format: of the engine that computes, exactly; the capacities are simulated beside it.
        cheaper: format of the level that some strategies ask for; None: int4, or of int4 pages int2.
        calibration: of the model, for strategies that need one.
        free: tokens decoded freely after each prompt, see ``run_freely``; 0: none.
        prompts: how many, cut from the text.
        miss_cost: see ``policy_of``; None: as measured of the engine that computes.

    Raises:
        InputError: for a checkpoint or options that cannot be.
    """
    evict = eviction_policy(eviction)
    known = None if calibration is None else Calibration.load(calibration)
    with open_for_text(path, revision, pool, format, progress, in_float32=True) as (model, tokenizer):
        shape, pooled = model.cachemoe.shape, model.cachemoe
        parsed = [Strategy.parse(each, shape.experts, shape.top_k, top_j) for each in strategies]
        parsed = list(dict.fromkeys([Strategy("original"), *parsed]))
        page = pooled.engine.page_format.page_bytes
        slots = [max(slots_of(each, shape, page)) for each in capacities]
        settings = [Setting(strategy, count) for count in dict.fromkeys(slots) for strategy in parsed]
        for strategy in parsed:
            strategy.check_calibration(known)
        own, source = pooled.engine.page_format, Checkpoint(model.name_or_path)
        formats = [own]
        if any(strategy.rule.cheaper and not strategy.rule.resident for strategy in parsed):
            formats.append(cheaper_format(source, own, cheaper))
        if known is not None:
            asked = any(strategy.rule.cheaper and strategy.rule.calibrated for strategy in parsed)
            kind = formats[1].kind if asked else None
            known.check(pooled.fingerprint, len(shape.layers), shape.experts, shape.top_k, kind)
        windows = windows_of(text, tokenizer, tokens, context, shape).to(model.device)
        cut = prompts_of(windows.flatten(), prompts, free, shape) if free else None
        miss_cost = pooled.engine.miss_cost() if miss_cost is None else miss_cost
        computing = [count.slots for count in pooled.layers]
        leveled = open_leveled(source, formats, computing, progress, pooled.engine, ranks_of(parsed))
        failed = outside(f"{path} cannot be run on the text")
        with (
            leveled as experts,
            progress("quality, stepped through the text, and by chance", len(windows)) as advance,
            failed,
        ):
            sizes = LevelBytes([each.page_bytes for each in formats], experts.surrogate_bytes())
            how = model, shape, windows, settings, evict, advance, known, miss_cost
            evaluation = evaluate(*how, controls=True, leveled=experts, level_bytes=sizes)
            run = None
            if free:
                cases = settings, evict, progress, known, miss_cost, experts, sizes
                run = run_freely(model, shape, cut, free, *cases)
        name, pages = Path(model.name_or_path).resolve().name, pooled.engine.page_format.kind
    return {
        "command": "quality",
        "model": {
            "name": name,
            "experts": shape.experts,
            "layers": len(shape.layers),
            "k": shape.top_k,
            "pages": pages,
            "cheaper": [each.kind for each in formats[1:]],
        },
        "text": text.name if text else HELD_OUT,
        "context": context,
        "tokens": evaluation.unmodified.tokens,
        "eviction": eviction,
        "machine": describe(),
        "miss_cost": miss_cost,
        "calibration": calibration and calibration.name,
        "unmodified": {
            "nats_per_token": evaluation.unmodified.nats_per_token,
            "perplexity": evaluation.unmodified.perplexity,
        },
        "free_running": run and run.summary(),
        "rows": _rows(settings, evaluation, shape, run),
    }


def _rows(settings: Sequence[Setting], evaluation: Evaluation, shape: MoeShape, run: FreeRun | None) -> list[dict]:
    belady = {count: evaluation.belady_miss_rate(count) for count in {setting.capacity for setting in settings}}
    return [
        {
            "capacity": setting.capacity,
            "capacity_fraction": setting.capacity / shape.experts,
            "strategy": str(setting.strategy),
            "label": setting.strategy.label,
            "top_j": kept(setting.strategy.top_j, shape.top_k),
            "belady_miss_rate": belady[setting.capacity],
            "nats_per_token": quality.nats_per_token,
        }
        | quality.costs(evaluation.unmodified)
        | {"free_running": run and run.costs(i)}
        for i, (setting, quality) in enumerate(zip(settings, evaluation.settings, strict=True))
    ]
