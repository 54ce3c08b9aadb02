"""One run of ``cachemoe systems``: eleven systems on the same work, in pools of the same bytes."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cachemoe.benchmarks.latency_run import SEGMENTS, LatencyOptions, run_latency
from cachemoe.benchmarks.payload import payload_format
from cachemoe.moe.calibrate_run import run_calibrate
from cachemoe.moe.calibration import CALIBRATION_VERSION, Calibration
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.fingerprint import fingerprint
from cachemoe.moe.free_running import PROMPT_TOKENS, prompts_of
from cachemoe.moe.leveled import cheaper_format
from cachemoe.moe.pack import stored_path
from cachemoe.moe.progress import Progress
from cachemoe.moe.quality_run import run_quality
from cachemoe.moe.shape import MoeShape
from cachemoe.moe.text import load_tokens
from cachemoe.offload.errors import InputError

CALIBRATION_TOKENS, CONTEXT = 2048, 512
PROMPTS = 96  # fewer leave the mean of most systems within its interval of 0


@dataclass(frozen=True)
class SystemsOptions:
    """What ``cachemoe systems`` was asked for; the fields are its options."""

    model: list[Path]
    text: list[Path | None]
    capacity: str
    payload: str
    tokens: int
    quality_tokens: int
    free: int
    profile: str
    strategy: list[str] | None


def run_systems(options: SystemsOptions, progress: Progress) -> dict:
    """Measure every system on every model and text: quality on all, speed and free-running on each model's first text.

    Raises:
        InputError: for options that cannot be.
    """
    if not options.text:
        raise InputError("the systems need a text to run on")
    if options.free:
        for path in options.model:  # before anything slow begins
            shape = Checkpoint(path).shape
            tokens = load_tokens(options.text[0], shape.vocabulary, PROMPTS * PROMPT_TOKENS)
            prompts_of(tokens, PROMPTS, options.free, shape)
    runs = []
    for path in options.model:
        checkpoint = Checkpoint(path)
        cheap = cheaper_format(checkpoint, payload_format(options.payload, checkpoint)).kind
        known = calibration_of(checkpoint, cheap, progress)
        for number, text in enumerate(options.text):
            latency = LatencyOptions(
                model=path,
                payload=options.payload,
                capacity=[options.capacity],
                strategy=options.strategy or strategies_of(checkpoint.shape),
                top_j=None,
                eviction="lru",
                tokens=options.tokens if number == 0 else 0,
                quality_tokens=options.quality_tokens,
                context=CONTEXT,
                text=text,
                profile=options.profile,
                device="cpu",
                store=None,
                prefetch=["none"],
                ahead=1,
                drive=["host"],
                timeline=None,
                calibration=known,
                controls=True,
                cheaper=cheap,
            )
            run = run_latency(latency, progress)
            if options.free and number == 0:
                run["free_running"] = _run_freely(run, latency, options.free, progress)
            runs.append(run)
    return {
        "command": "systems",
        "settings": asdict(replace(options, model=[], text=[], strategy=None)) | {"segments": SEGMENTS},
        "runs": runs,
    }


def _run_freely(run: dict, options: LatencyOptions, free: int, progress: Progress) -> dict:
    """What the systems on the front cost where no text takes them back: see ``cachemoe quality --free``."""
    (capacity,) = run["capacities"]
    front = front_of([row for row in capacity["rows"] if "miss_rate" in row])
    tokens = -(-PROMPTS * PROMPT_TOKENS // CONTEXT) * CONTEXT  # whole windows
    work = options.text, options.capacity, front, options.top_j, options.eviction, tokens, CONTEXT
    how = None, None, options.cheaper, options.calibration, free, PROMPTS, progress, run["settings"]["miss_cost"]
    return run_quality(str(options.model), None, *work, *how)


def calibration_of(checkpoint: Checkpoint, cheaper: str, progress: Progress) -> Path:
    """The file of the checkpoint's calibration, in the cache directory, made if it is not there or is of other weights.

    Made on the end of the held-out prose, of which ``latency`` reads the beginning.
    """
    path = stored_path(checkpoint, f"calibration-{cheaper}-v{CALIBRATION_VERSION}")
    if not path.exists() or Calibration.load(path).model != fingerprint(checkpoint, progress):
        arguments = str(checkpoint.path), None, None, CALIBRATION_TOKENS, CONTEXT, None, None, cheaper, progress
        run_calibrate(*arguments).save(path)
    return path


def strategies_of(shape: MoeShape) -> list[str]:
    """Each system at the setting of its paper, or, where that is of one model's shape, at a mild one."""
    k, experts = shape.top_k, shape.experts
    return [
        *([f"pruning:{k - 1}"] if k > 1 else []),
        "cache-prior:0.5",
        "relu-route",
        "latency-ratio:0.3",
        "hobbit:0.6:0.9",
        "readme-lookahead:2",
        "adap-skip:0.003",
        "naee-skip:0.5",
        f"naee-prune:{max(k, 3 * experts // 4)}",
        "smola-lowrank:4",
        "edgemoe:0.01",
        "pregated-hint",
        "pregated-exec",
        "moec-substitute:output",
        "moec-substitute:any",
        "random-drop:0.25",
        "random-swap:0.5",
        "random-cheap:0.25",
    ]


def front_of(rows: Sequence[dict]) -> list[str]:
    """The names of the rows that none beats in both bytes a token and perplexity, fewest bytes first.

    Two rows are compared on the windows that both were run on, and by nats a token to five places, since exact systems
    differ by rounding. A row that is not finite is not on the front.
    """
    finite = [row for row in rows if math.isfinite(row["perplexity_change"])]

    def beats(a: dict, b: dict) -> bool:
        windows = min(len(row["windows"]["nats_more"]) for row in (a, b))
        ours, theirs = (
            (sum(row["windows"]["missed_bytes"][:windows]), round(_nats_more(row, windows), 5)) for row in (a, b)
        )
        alike = ours == theirs  # of which the first stays
        return rows.index(a) < rows.index(b) if alike else ours[0] <= theirs[0] and ours[1] <= theirs[1]

    front = [row for row in finite if not any(beats(other, row) for other in finite if other is not row)]
    return [row["name"] for row in sorted(front, key=lambda row: row["missed_bytes_per_token"])]


def _nats_more(row: dict, windows: int) -> float:
    """Than the unmodified model's, a token, on the first windows."""
    more = row["windows"]["nats_more"]
    return sum(more[:windows]) / (windows * row["scored_tokens"] / len(more))
