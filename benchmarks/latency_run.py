"""One run of ``cachemoe latency``, from options to the report."""

import hashlib
import math
import statistics
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cachemoe.benchmarks.latency_decode import ORIGINAL, DecodePlan, decode_rows, rows_at
from cachemoe.benchmarks.latency_prefetch import ADMISSION, NO_PREFETCH, admits, check_prefetchers
from cachemoe.benchmarks.latency_report import capacity_report
from cachemoe.benchmarks.latency_timeline import plot_timeline
from cachemoe.benchmarks.payload import (
    FILE,
    NATIVE,
    PINNED,
    check_level,
    open_level,
    open_payload,
    payload_format,
    payload_surrogates,
)
from cachemoe.benchmarks.speeds import (
    device_copy_bandwidth,
    expert_bandwidth,
    memory_bandwidth,
    pinned_copy_bandwidth,
    store_bandwidths,
)
from cachemoe.moe.calibration import Calibration
from cachemoe.moe.checkpoint import DEFAULT_MODEL, Checkpoint
from cachemoe.moe.fingerprint import fingerprint
from cachemoe.moe.leveled import cheaper_format, open_leveled, ranks_of
from cachemoe.moe.machine import describe
from cachemoe.moe.models import load_model
from cachemoe.moe.progress import Progress
from cachemoe.moe.quality import Setting, evaluate
from cachemoe.moe.shape import MoeShape
from cachemoe.moe.sizes import LevelBytes, layer_slots, split_pool
from cachemoe.moe.strategies import Strategy, kept
from cachemoe.moe.text import HELD_OUT, load_tokens
from cachemoe.offload.device_engine import DeviceEngine
from cachemoe.offload.engine import OffloadEngine
from cachemoe.offload.errors import InputError
from cachemoe.offload.files import whole_file
from cachemoe.offload.profiles import profile
from cachemoe.offload.residency import eviction_policy
from cachemoe.offload.resident_engine import ResidentEngine
from cachemoe.offload.staging import STAGING
from cachemoe.offload.store import ExpertStore, Store
from cachemoe.offload.timeline import Timeline

SEGMENTS = 3
HOST, GRAPH = "host", "graph"
PREFIX = 64


@dataclass(frozen=True)
class LatencyOptions:
    """What ``cachemoe latency`` was asked for; the fields are its options."""

    model: Path | None
    payload: str
    capacity: list[str]
    strategy: list[str] | None
    top_j: int | None
    eviction: str
    tokens: int
    quality_tokens: int
    context: int
    text: Path | None
    profile: str
    device: str | None
    store: str | None
    prefetch: list[str]
    ahead: int
    drive: list[str]
    timeline: Path | None
    calibration: Path | None
    controls: bool
    cheaper: str | None


def run_latency(options: LatencyOptions, progress: Progress) -> dict:
    """Measure, and report every figure.

    Raises:
        InputError: for options that cannot be, before anything slow begins; or if a page cannot be read, or is damaged.
    """
    checkpoint = Checkpoint(options.model or DEFAULT_MODEL)
    shape = checkpoint.shape
    known = None if options.calibration is None else Calibration.load(options.calibration)
    strategies, capacities = _check(options, shape, known)
    evict = eviction_policy(options.eviction)
    prefetchers = list(dict.fromkeys([NO_PREFETCH, *options.prefetch]))  # what all speeds are held to
    check_prefetchers(prefetchers, options.ahead, len(shape.layers))
    device = _device(options.device)
    level = options.store or (PINNED if device == "cuda" else FILE)
    check_level(level, device, len(shape.layers) * shape.experts)
    _check_drive(options, level)
    device_profile = profile(options.profile)
    windows, segments = _tokens(options, shape)
    settings = [Setting(strategy, capacity) for capacity in capacities for strategy in strategies]

    kinds, formats = [None], [checkpoint.page_format(None)]
    if any(s.rule.cheaper and not s.rule.resident for s in strategies):
        formats.append(cheaper_format(checkpoint, payload_format(options.payload, checkpoint), options.cheaper))
        kinds.append(formats[1].kind)
    if known is not None:
        asked = any(strategy.rule.cheaper and strategy.rule.calibrated for strategy in strategies)
        mine = fingerprint(checkpoint, progress), len(shape.layers), shape.experts, shape.top_k
        known.check(*mine, formats[1].kind if asked else None)
    model = load_model(checkpoint.path)
    with ExitStack() as stack:
        files = [stack.enter_context(open_payload(options.payload, checkpoint, progress, kind)) for kind in kinds]
        stores = [stack.enter_context(open_level(level, each, progress)) for each in files]
        (file, *_), (store, *_) = files, stores
        with progress("reading every page for the resident rows", file.pages) as advance:
            resident = ResidentEngine(store, [shape.experts] * len(shape.layers), device, advance)
        speeds = _speeds(file, store, resident, shape, device)
        resident_speed = speeds["resident_expert_bytes_per_second"]
        pacing = device_profile.pacing(resident_speed) if device_profile else None
        link = min(speeds["link_bytes_per_second"], pacing.bytes_per_second if pacing else math.inf)
        chooser_knows = {"calibration": known, "miss_cost": math.log1p(resident_speed / link)}
        everyone, ranks = [shape.experts] * len(shape.layers), ranks_of(strategies)
        with ExitStack() as computing:
            leveled, surrogates, taken = None, {}, {}
            if len(formats) > 1 or ranks:
                opened = open_leveled(checkpoint, formats, everyone, progress, ranks=ranks)
                leveled = computing.enter_context(opened)
                surrogates = payload_surrogates(options.payload, checkpoint, leveled.surrogates)
                of_pages = file.page_bytes / formats[0].page_bytes  # the payload's, beside the model's
                taken = {rank: round(size * of_pages) for rank, size in leveled.surrogate_bytes().items()}
            level_bytes = LevelBytes([each.page_bytes for each in files], taken)
            advance = computing.enter_context(progress("quality, stepped through the text", len(windows)))
            how = *(model, shape, windows, settings, evict, advance), *chooser_knows.values(), options.controls
            evaluation = evaluate(*how, leveled, level_bytes)
        model.to(device)
        driven_resident = None
        if GRAPH in options.drive:
            driven_resident = DeviceEngine(store, [shape.experts] * len(shape.layers), shape.top_k, device)
        timeline = Timeline(device == "cuda") if options.timeline else None
        native = options.payload == NATIVE
        profiled = evaluation.original_ids.transpose(0, 1)
        plan = DecodePlan(segments, PREFIX, evict, native, options.ahead, profiled, timeline, chooser_knows)

        def measure(capacity: int) -> dict:
            """One capacity; its pools are gone when the next one's are made."""
            pages, speeds_here = level_bytes.pages, speeds | {"link_bytes_per_second": link}
            if not options.tokens:
                return capacity_report(capacity, shape.experts, [], settings, evaluation, speeds_here, pages)
            counts = [capacity] * len(shape.layers)
            ahead = set(prefetchers) != {NO_PREFETCH} or any(s.rule.prefetches for s in strategies)
            staging = STAGING if ahead else 0
            how = {"pacing": pacing, "staging": staging, "timeline": timeline}
            with ExitStack() as pools:
                engines_by_kind = {}

                def offload(strategy: Strategy, admits: bool) -> OffloadEngine:
                    """One for all strategies whose pools are of a kind."""
                    rule, places = strategy.rule, strategy.places(shape.experts, shape.top_k)
                    rank = strategy.value if rule.resident else None
                    if (kind := (rule.cheaper, rule.shared, rule.share, rank, admits)) not in engines_by_kind:
                        full, cheaper = split_pool(counts, strategy, level_bytes, shape.experts, places)
                        more = {"cheaper": cheaper, "surrogates": surrogates.get(rank, ()), "admits": admits}
                        made = OffloadEngine(stores[: 1 + len(cheaper)], full, device, **more, **how)
                        engines_by_kind[kind] = pools.enter_context(made)
                    return engines_by_kind[kind]

                driven = DeviceEngine(store, counts, shape.top_k, device) if GRAPH in options.drive else None
                engines = offload, resident, driven, driven_resident
                rows = rows_at(capacity, settings, prefetchers, evaluation, *engines, shape)
                with progress(f"decoding with {capacity} of {shape.experts} experts", len(rows) * SEGMENTS) as advance:
                    decode_rows(model, shape, rows, plan, advance)
            return capacity_report(capacity, shape.experts, rows, settings, evaluation, speeds_here, pages)

        reports = [measure(capacity) for capacity in capacities]
    if timeline is not None:
        timeline.write(options.timeline)
        moved = [row["name"] for row in reports[-1]["rows"] if row["counters"]["pages_read"] and not row["in_a_graph"]]
        _picture(timeline, options.timeline.with_suffix(".png"), moved[-1])
    # Names, not paths: a report is made to be shown.
    names = {
        "model": checkpoint.path.name,
        "text": options.text.name if options.text else HELD_OUT,
        "strategy": [str(strategy) for strategy in strategies],
        "top_j": kept(options.top_j, shape.top_k),
        "device": device,
        "prefetch": prefetchers,
        "timeline": options.timeline and options.timeline.name,
        "calibration": options.calibration and options.calibration.name,
        "miss_cost": chooser_knows["miss_cost"],
    }
    text = bytes(torch.cat((windows.flatten(), segments.flatten())).tolist())
    return {
        "command": "latency",
        "settings": asdict(options) | names | {"segments": SEGMENTS, "prefix": PREFIX},
        "machine": describe() | speeds,
        "model": {
            "name": checkpoint.path.name,
            "fingerprint": fingerprint(checkpoint, progress),
            "experts": shape.experts,
            "layers": len(shape.layers),
            "k": shape.top_k,
        },
        "text_sha256": hashlib.sha256(text).hexdigest(),
        "store": {
            "name": file.path.name,
            "level": level,
            "pages": file.pages,
            "page_bytes": file.page_bytes,
            "format": asdict(file.layout.page_format),
            "direct": file.direct,
            "cheaper": [asdict(each.layout.page_format) for each in files[1:]],
        },
        "profile": asdict(device_profile) | {"name": options.profile, "pacing": asdict(pacing)} if pacing else None,
        "unmodified": {
            "tokens": evaluation.unmodified.tokens,
            "bits_per_byte": evaluation.unmodified.bits_per_byte,
            "perplexity": evaluation.unmodified.perplexity,
        },
        "capacities": reports,
    }


def _device(name: str | None) -> str:
    """``cuda`` where there is a GPU, unless another is asked for."""
    if name not in (None, "cpu", "cuda"):
        raise InputError(f"--device is cpu or cuda, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda needs a GPU that torch can use, and there is none: leave it out")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def _picture(timeline: Timeline, path: Path, row: str) -> None:
    """Up to three tokens of the row's last segment, if they were recorded."""
    marks = [mark for mark in timeline.marks() if mark.name.startswith(f"{row}: ")]
    first = max(mark.at for mark in marks if mark.name.endswith(": token 1"))
    begins = [mark.at for mark in marks if mark.at >= first][-4:]
    if len(begins) > 1 and any(span.start > begins[0] for span in timeline.spans()):
        with whole_file(path) as partial:
            plot_timeline(timeline, partial, (begins[0], begins[-1]), row)


def _check_drive(options: LatencyOptions, level: str) -> None:
    """Whether the engines asked for can run on what was chosen."""
    if unknown := set(options.drive).difference((HOST, GRAPH)):
        raise InputError(f"--drive is {HOST} or {GRAPH}, not {min(unknown)!r}")
    if GRAPH in options.drive and level != PINNED:
        raise InputError(f"--drive {GRAPH} reads all pages from pinned memory: add --store {PINNED}")
    if GRAPH in options.drive and options.profile != "none":
        raise InputError(f"--drive {GRAPH} has no host to pace the link: leave --profile out")


def _speeds(file: ExpertStore, store: Store, resident: ResidentEngine, shape: MoeShape, device: str) -> dict:
    # Memory first: what the disk's measurement lets go of keeps the system busy for a while.
    experts = expert_bandwidth(resident, shape.experts, shape.top_k, device)
    memory = device_copy_bandwidth() if device == "cuda" else memory_bandwidth()
    disk = store_bandwidths(file)
    ratios = [engine / bare for bare, engine in zip(disk["bare"], disk["engine"], strict=True)]
    if device == "cuda":
        link = pinned_copy_bandwidth()
    else:
        link = statistics.median((disk if store is file else store_bandwidths(store))["bare"])
    return {
        "disk_bytes_per_second": statistics.median(disk["bare"]),
        "engine_disk_bytes_per_second": statistics.median(disk["engine"]),
        "engine_over_bare_disk": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "link_bytes_per_second": link,  # at which a missing page could move at best
        "memory_bytes_per_second": memory,
        "resident_expert_bytes_per_second": experts,
    }


def _check(
    options: LatencyOptions, shape: MoeShape, calibration: Calibration | None
) -> tuple[list[Strategy], list[int]]:
    texts = options.strategy or _default_strategies(shape)
    parsed = [Strategy.parse(text, shape.experts, shape.top_k, options.top_j) for text in texts]
    strategies = list(dict.fromkeys([ORIGINAL, *parsed]))
    capacities = list(dict.fromkeys(_capacity(text, shape) for text in options.capacity))
    if ADMISSION in options.prefetch and not any(admits(strategy) for strategy in strategies):
        raise InputError(
            f"--prefetch {ADMISSION} fetches experts that a strategy asked for and did not wait for, since a resident "
            f"stood in or a cheaper page ran, and {', '.join(map(str, strategies))} wait for all that they ask for: "
            "add --strategy random-cheap:0.25"
        )
    for strategy in strategies:
        strategy.check_calibration(calibration)
        strategy.check_slots(min(capacities), shape.experts, shape.top_k)
    return strategies, capacities


def _default_strategies(shape: MoeShape) -> list[str]:
    """A few settings of each strategy, the windows in proportion to K."""
    pruning = [f"pruning:{shape.top_k - 1}"] if shape.top_k > 1 else []
    windows = [f"max-rank:{min(factor * shape.top_k, shape.experts)}" for factor in (2, 4)]
    sums = [f"cumsum:{p}" for p in (0.3, 0.5)]
    priors = [f"cache-prior:{value}" for value in (0.05, 0.1, 0.2, 0.5)]
    return [*pruning, *windows, *sums, *priors]


def _capacity(text: str, shape: MoeShape) -> int:
    """Slots of a layer, from ``50%`` or ``30``."""
    if (slots := layer_slots(text.strip(), shape.experts)) is None:
        raise InputError(f"--capacity is a number of experts or a percentage such as 50%, not {text!r}")
    if not shape.top_k <= slots <= shape.experts:
        raise InputError(
            f"--capacity {text} is {slots} experts a layer: it must lie between the {shape.top_k} that a token uses "
            f"and the {shape.experts} there are"
        )
    return slots


def _tokens(options: LatencyOptions, shape: MoeShape) -> tuple[torch.Tensor, torch.Tensor]:
    """``[windows, context]`` for quality, and ``[segments, prefix + tokens]`` for decode from the text after it."""
    if options.context > shape.context:
        raise InputError(f"--context {options.context} is more than the {shape.context} tokens that the model takes")
    count = options.quality_tokens // options.context
    if count < 1:
        raise InputError(f"--quality-tokens {options.quality_tokens} is less than one --context of {options.context}")
    length = PREFIX + -(-options.tokens // SEGMENTS)
    if length > shape.context:
        raise InputError(f"--tokens {options.tokens} needs contexts longer than the {shape.context} the model takes")
    scored, decoded = count * options.context, SEGMENTS * length
    tokens = load_tokens(options.text, shape.vocabulary, scored + decoded)
    return tokens[:scored].view(count, options.context), tokens[scored:].view(SEGMENTS, length)
