"""Run a checkpoint whose experts do not fit: ``load`` it, or ``swap`` a model that is in memory already."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import pairwise
from secrets import token_hex

import torch

from cachemoe.kernels.formats import PageFormat
from cachemoe.kernels.rounded_cpu import KINDS
from cachemoe.moe.budgets import adaptive_slots
from cachemoe.moe.calibration import Calibration, missing
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.decode_step import install_steps
from cachemoe.moe.dense import round_dense
from cachemoe.moe.fingerprint import Fingerprint
from cachemoe.moe.hub import checkpoint_folder
from cachemoe.moe.in_memory import ModelExperts
from cachemoe.moe.layers import check_experts, moe_layers, routing_rules
from cachemoe.moe.leveled import cheaper_format
from cachemoe.moe.low_rank import LowRank
from cachemoe.moe.models import load_tokenizer, load_without_experts, outline
from cachemoe.moe.pack import holds, open_packed, pack, store_directory
from cachemoe.moe.policies.rule import EXACT
from cachemoe.moe.pooled import PooledExperts
from cachemoe.moe.progress import Progress, show_progress
from cachemoe.moe.routers import RoutingRule
from cachemoe.moe.saved_residency import read_residency
from cachemoe.moe.sizes import LevelBytes, slots_of, split_pool
from cachemoe.moe.strategies import Original, Strategy, checked
from cachemoe.moe.surrogates import bytes_of, open_surrogates
from cachemoe.offload.engine import OffloadEngine
from cachemoe.offload.errors import InputError
from cachemoe.offload.pinned import PinnedStore
from cachemoe.offload.plain_torch import plain_torch
from cachemoe.offload.residency import eviction_policy, least_recently_used
from cachemoe.offload.resident_engine import ResidentEngine
from cachemoe.offload.staging import STAGING
from cachemoe.offload.store import ExpertStore, StoreLayout

VERIFY = ("read", "open", "off")
PREFETCHES = None, "gate"
CAPACITIES = EVEN, ADAPTIVE = "even", "adaptive"


@plain_torch()
def load(
    path: str | os.PathLike,
    pool: str | int | None = None,
    routing: Strategy | str | None = None,
    format: str | Sequence[str] | None = None,
    store: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    eviction: str | None = None,
    device: str | None = None,
    verify: str = "read",
    progress: Progress = show_progress,
    revision: str | None = None,
    calibration: str | os.PathLike | None = None,
    capacity: str = EVEN,
    dense: str | None = None,
    residency: str | os.PathLike | None = None,
    prefetch: str | None = None,
):
    """A pretrained MoE model with its experts in a pool over a store on disk; nothing is trained.

    Args:
        path: checkpoint folder of safetensors, or a Hugging Face hub id.
        pool: how many experts are in memory: a share (``"50%"``), a size of memory (``"6GiB"``), or a number of each
            layer's; None: half of them, or the K that a token uses where half are fewer.
        routing: which experts a token uses, as ``CachePrior(0.5)`` or ``"cache-prior:0.5"``; None: exactly those of
            the model's own routers.
        format: of the pages: bf16, fp16, fp32, int8, int4 or int2; None: the checkpoint's own precision, exact. A
            routing that asks for cheaper levels takes theirs after it: without, int4, or of int4 pages int2.
        store: made by ``cachemoe pack`` from this checkpoint, one for each level; None: in the cache directory, made if
            they are missing.
        eviction: which resident expert leaves: ``lru`` or ``lfu``; None: as the routing says, else ``lru``.
        device: where the model runs; None: ``cuda`` where there is a GPU.
        verify: when pages are held against their checksums: ``read``, each time that one comes off the disk; ``open``,
            all of them now, and never again; ``off``.
        progress: shows what takes long.
        revision: of a hub id: branch, tag or commit; None: its main branch.
        calibration: made by ``cachemoe calibrate`` of this checkpoint, for routings that need one.
        capacity: how the layers share the pool: ``even``, or ``adaptive``, as they would miss least together on the
            calibration's text.
        dense: int8 or int4, on a CPU: rounds all other matrices but the routers, and lets a token through a layer's
            attention in one call; None: they stay as they are, bit for bit.
        residency: made by ``model.cachemoe.save_residency``: who is in the pool from the start; None: nobody, or
            everybody where the pool has room for all.
        prefetch: ``gate``: while a layer computes, what its successor's router, with the same routing, says of its
            input is fetched ahead; no output depends on it. None: nothing is, but by a routing that does so itself.

    Returns:
        The transformers model, with a ``PooledExperts`` as ``model.cachemoe``, and its tokenizer: None if it has none,
        or, with a warning that says why, one that transformers cannot load.

    Raises:
        InputError: for a checkpoint, store, pool or routing that cannot be, in one sentence.
    """
    checkpoint = Checkpoint(checkpoint_folder(path, revision))
    shape = checkpoint.shape
    routing = checked(routing, shape.experts, shape.top_k)
    evict = None if eviction is None else eviction_policy(eviction)
    known = None if calibration is None else Calibration.load(calibration)
    routing.check_calibration(known)
    if known is not None:
        known.check(None, len(shape.layers), shape.experts, shape.top_k)
    if capacity not in CAPACITIES:
        raise InputError(f"capacity is {' or '.join(CAPACITIES)}, not {capacity!r}")
    if capacity == ADAPTIVE and known is None:
        raise missing("an adaptive capacity")
    if prefetch not in PREFETCHES:
        raise InputError(f"prefetch is {PREFETCHES[1]}, or left out, not {prefetch!r}")
    if prefetch is not None and (routing.rule.decides or routing.rule.prefetches):
        raise InputError(f"{routing} asks for experts ahead itself: leave prefetch out")
    if verify not in VERIFY:
        raise InputError(f"verify is one of {', '.join(VERIFY)}, not {verify!r}")
    device = _device(device)
    if dense is not None and dense not in KINDS:
        raise InputError(f"dense is {' or '.join(KINDS)}, or left out, not {dense!r}")
    if dense is not None and device.type != "cpu":
        raise InputError(f"dense={dense!r} is for a CPU, and the model goes to {device}: leave it out")
    with ExitStack() as stack:
        stores, layouts = _levels(stack, checkpoint, routing, format, store, verify == "read")
        layout = layouts[0]
        slots = slots_of(pool, shape, layout.page_format.page_bytes)
        if capacity == ADAPTIVE:
            slots = adaptive_slots(slots, known, routing.places(shape.experts, shape.top_k))
        routing.check_slots(min(slots), shape.experts, shape.top_k)
        rule, places = routing.rule, routing.places(shape.experts, shape.top_k)
        surrogates = open_surrogates(checkpoint, int(routing.value), progress) if rule.resident else []
        taken = {routing.value: bytes_of(surrogates)} if surrogates else {}
        level_bytes = LevelBytes([each.page_format.page_bytes for each in layouts], taken)
        capacities = split_pool(slots, routing, level_bytes, shape.experts, places)
        try:
            tokenizer = load_tokenizer(checkpoint.path)
        except InputError as error:  # a model needs none
            warnings.warn(f"{error}; the model is loaded without", stacklevel=3)
            tokenizer = None
        model = load_without_experts(checkpoint, device)
        rules = check_model(model, shape.top_k, layout.page_format, routing)
        if known is not None and rule.calibrated and rule.cheaper:
            known.check(None, len(shape.layers), shape.experts, shape.top_k, layouts[1].page_format.kind)
        for i, each in enumerate(layouts):  # what takes long comes last
            if len(stores) <= i:
                packed = open_packed(checkpoint, each, progress, check_reads=verify == "read")
                stores.append(stack.enter_context(packed))
            elif not holds(stores[i], checkpoint, each, progress):
                raise InputError(
                    f"{stores[i].path} holds pages of another checkpoint than {checkpoint.path}, or of weights that it "
                    "had before: pack this one"
                )
        if verify == "open":
            for opened in stores:
                with progress(f"verifying {opened.pages} pages", opened.pages) as advance:
                    opened.verify(advance)
        staging = STAGING if routing.rule.prefetches or prefetch is not None else 0
        there = [each.to(device) for each in surrogates]
        engine = _engine(stack, stores, capacities, device, evict or least_recently_used, staging, progress, there)
        if residency is not None:
            engine.state = read_residency(residency, engine.state, engine.evict, stores[0].layout.model)
        elif len(layouts) == 1 and not engine.state.shared and min(capacities[0]) == shape.experts:
            engine.state.slot_of[:] = engine.state.page_of[:] = torch.arange(shape.experts)
        if residents := int((engine.state.page_of >= 0).sum()):
            with progress(f"reading {residents} experts", residents) as advance:
                engine.fill(advance)
        rounding, steps = None, []
        if dense is not None:
            rounding = round_dense(model, dense, progress)
            steps = install_steps(model)
        checkpoint.check_unchanged()  # or weights of before and after would compute together
        how = engine, routing, evict, rules, known, capacity == ADAPTIVE, level_bytes, rounding, prefetch is not None
        pooled = PooledExperts(model, checkpoint, stores[0].layout, *how)
        pooled.join(steps)
        pooled.keep(stack.pop_all())
    return model, tokenizer


def _levels(
    stack: ExitStack, checkpoint: Checkpoint, routing: Strategy, format, store, check_reads: bool
) -> tuple[list[ExpertStore], list[StoreLayout]]:
    """The stores that the user names, opened, and the layout of each level."""
    formats, named = ([] if each is None else [each] if isinstance(each, str | os.PathLike) else list(each)
                      for each in (format, store))  # fmt: skip
    stores = [stack.enter_context(ExpertStore(path, check_reads=check_reads)) for path in named]
    for opened, given in zip(stores, formats, strict=False):
        if given != (kind := opened.layout.page_format.kind):
            raise InputError(f"{opened.path} holds {kind} pages, and format says {given}: leave it out")
    wanted = 1 if routing.rule.resident else 1 + routing.rule.cheaper
    if (most := max(len(stores), len(formats))) > wanted:
        raise InputError(f"{routing} computes with {wanted} formats of pages, and {most} were given")
    if stores and len(stores) < wanted:
        raise InputError(f"{routing} needs a store for each of {wanted} formats of pages, and {len(stores)} were given")
    if stores:
        kinds = [opened.layout.page_format for opened in stores]
        return stores, [checkpoint.layout(kind.kind, kind.group) for kind in kinds]
    layouts = [checkpoint.layout(kind) for kind in formats or [None]]
    while len(layouts) < wanted:
        layouts.append(checkpoint.layout(cheaper_format(checkpoint, layouts[-1].page_format).kind))
    for better, cheaper in pairwise(layouts):
        if cheaper.page_format.page_bytes >= better.page_format.page_bytes:
            raise InputError(
                f"{cheaper.page_format.kind} pages take no less than {better.page_format.kind} ones: choose cheaper"
            )
    return [], layouts


@plain_torch()
def swap(
    model,
    pool: str | int | None = None,
    routing: Strategy | str | None = None,
    format: str | None = None,
    eviction: str = "lru",
    progress: Progress = show_progress,
    calibration: str | os.PathLike | None = None,
) -> PooledExperts:
    """Swap kernels and pool into a transformers model that is in memory; its experts' own parameters are freed.

    Args:
        model: any with experts that go through transformers' experts interface; changed in place, for inference alone.
            Without a pool that goes layer by layer, and a model interrupted in between is of no use any more.
        pool: as for ``load``: the experts move to a file in the cache directory that goes when they are closed. None:
            all stay in memory, as pages, and only the kernels are swapped.
        routing, format, eviction, progress, calibration: as for ``load``.

    Returns:
        What is then ``model.cachemoe`` too.

    Raises:
        InputError: for a model, pool or routing that cannot be, in one sentence.
    """
    experts = ModelExperts(model)
    routing = checked(routing, experts.shape.experts, experts.shape.top_k)
    evict = eviction_policy(eviction)
    known = None if calibration is None else Calibration.load(calibration)
    routing.check_calibration(known)
    if routing.rule.cheaper or routing.rule.shared:
        raise InputError(f"{routing} needs more than one form of an expert: `load` the checkpoint with it")
    layout = experts.layout(format)
    rules = check_model(model, experts.shape.top_k, layout.page_format, routing)
    with ExitStack() as stack:
        if pool is None:
            count = layout.layers * layout.experts
            with progress(f"packing {count} experts", count) as advance:
                made = Fingerprint(experts)
                pages = counted(experts.pages(layout.page_format, made.add), advance)
                engine = ResidentEngine.of_pages(layout, pages, model.device)
            layout = replace(layout, model=str(made))
        else:
            capacity = slots_of(pool, experts.shape, layout.page_format.page_bytes)
            path = store_directory() / f"swapped-{token_hex(8)}.safetensors"
            try:
                pack(experts, layout, path, progress)
                file = stack.enter_context(ExpertStore(path))
            finally:  # what is open stays readable, and nothing is left behind however this ends
                with suppress(OSError):
                    path.unlink()
            staging = STAGING if routing.rule.prefetches else 0
            engine = _engine(stack, [file], (capacity, []), model.device, evict, staging, progress)
            layout = file.layout
        PooledExperts(model, experts, layout, engine, routing, evict, rules, known).keep(stack.pop_all())
    return model.cachemoe


def check_loadable(checkpoint: Checkpoint, format: str | None = None) -> None:
    """Whether ``load`` would take the checkpoint, told from its headers and config: before work that is for nothing.

    Raises:
        InputError: as ``load`` does for a model that it cannot run.
    """
    check_model(outline(checkpoint), checkpoint.shape.top_k, checkpoint.page_format(format), Original())


def check_model(model, top_k: int, page_format: PageFormat, routing: Strategy) -> list[RoutingRule] | None:
    """Whether the model's experts and routers are such as pages and routing suppose.

    Returns:
        The routers' rules, which exact routing does not need: None for that.

    Raises:
        InputError: if not.
    """
    layers = moe_layers(model)
    for layer in layers:
        check_experts(layer, page_format)
    return None if routing.label == EXACT else routing_rules(layers, top_k, "cpu")


def _device(name: torch.device | str | None) -> torch.device:
    """The device of that name; None: a GPU where there is one."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device is cpu or cuda, not {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device is cpu or cuda, not {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={name!r} needs a GPU that torch can use, and there is none: leave it out")
    return device


def _engine(
    stack: ExitStack,
    stores: Sequence[ExpertStore],
    capacities: tuple[list[int], list[int]],
    device: torch.device,
    evict: Callable,
    staging: int,
    progress: Progress,
    surrogates: Sequence[LowRank] = (),
) -> OffloadEngine:
    """The engine over files: through pinned memory where a GPU computes."""
    if device.type != "cpu":
        files, stores = stores, []
        for file in files:
            with progress("reading every page into pinned memory", file.pages) as advance:
                stores.append(stack.enter_context(PinnedStore(file, advance)))
    capacity, cheaper = capacities
    how = {"staging": staging, "evict": evict, "cheaper": cheaper, "surrogates": surrogates}
    return stack.enter_context(OffloadEngine(stores, capacity, device, **how))


def counted(pages: Iterator[torch.Tensor], advance: Callable[[], None]) -> Iterator[torch.Tensor]:
    """The pages, each counted when it is taken."""
    for page in pages:
        yield page
        advance()
