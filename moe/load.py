"""Run a checkpoint whose experts do not fit: ``load`` it, or ``swap`` a model that is in memory already."""

import os
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from cachemoe.kernels import route_cpu
from cachemoe.kernels.compile_c import cache_directory
from cachemoe.kernels.reference import Routing
from cachemoe.moe.checkpoint import Checkpoint, MoeShape
from cachemoe.moe.in_memory import ModelExperts
from cachemoe.moe.pack import open_packed, pack, rounds
from cachemoe.moe.progress import Progress, show_progress
from cachemoe.moe.routers import choose
from cachemoe.moe.sizes import size_of, size_text
from cachemoe.moe.strategies import EXACT, PRECISION_CHANGED, Original, Strategy, cache_bias
from cachemoe.moe.swap import Swap, check_experts, load_tokenizer, load_without_experts, moe_layers, routing_rules
from cachemoe.offload.counters import Counters
from cachemoe.offload.engine import OffloadEngine, ResidentEngine
from cachemoe.offload.errors import InputError
from cachemoe.offload.pinned import PinnedStore
from cachemoe.offload.residency import eviction_policy
from cachemoe.offload.store import ExpertStore, StoreLayout

HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "merges.txt"]


def load(
    path: str | os.PathLike,
    pool: str | int = "50%",
    routing: Strategy | str | None = None,
    format: str | None = None,
    store: str | os.PathLike | None = None,
    eviction: str = "lru",
    device: str | None = None,
    progress: Progress = show_progress,
):
    """A pretrained MoE model with its experts in a pool over a store on disk; nothing is trained.

    Args:
        path: checkpoint folder of safetensors, or a Hugging Face hub id.
        pool: how many experts are in memory: a share (``"50%"``), a size of memory (``"6GiB"``), or a number of each
            layer's.
        routing: which experts a token uses, as ``CachePrior(0.5)`` or ``"cache-prior:0.5"``; None: exactly those of
            the model's own routers.
        format: of the pages: bf16, fp16, fp32, int8 or int4; None: the checkpoint's own precision, exact.
        store: made by ``cachemoe pack`` from this checkpoint; None: one in the cache directory, made if it is missing.
        eviction: which resident expert leaves: ``lru`` or ``lfu``.
        device: where the model runs; None: ``cuda`` where there is a GPU.
        progress: shows what takes long.

    Returns:
        The transformers model, with a ``PooledExperts`` as ``model.cachemoe``, and its tokenizer, None if it has none.

    Raises:
        InputError: for a checkpoint, store, pool or routing that cannot be, in one sentence.
    """
    checkpoint = Checkpoint(checkpoint_folder(path))
    shape = checkpoint.shape
    routing = _strategy(routing, shape)
    evict = eviction_policy(eviction)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with ExitStack() as stack:
        if store is None:
            layout = checkpoint.layout(format)
            capacity = slots_of(pool, shape, layout.page_format.page_bytes)
            opened = stack.enter_context(open_packed(checkpoint, layout, progress))
        else:
            opened = stack.enter_context(ExpertStore(store))
            kind = opened.layout.page_format
            layout = checkpoint.layout(kind.kind, kind.group)
            if opened.layout != layout:
                raise InputError(f"{store} holds pages of another checkpoint than {checkpoint.path}: pack this one")
            capacity = slots_of(pool, shape, opened.page_bytes)
        model = load_without_experts(checkpoint, device)
        engine = _engine(stack, opened, capacity, device, evict, progress)
        tokenizer = load_tokenizer(checkpoint.path)
        PooledExperts(model, checkpoint, layout, engine, routing, evict).keep(stack.pop_all())
    return model, tokenizer


def swap(
    model,
    pool: str | int | None = None,
    routing: Strategy | str | None = None,
    format: str | None = None,
    eviction: str = "lru",
    progress: Progress = show_progress,
) -> "PooledExperts":
    """Swap kernels and pool into a transformers model that is in memory; its experts' own parameters are freed.

    Args:
        model: any with experts that go through transformers' experts interface; changed in place, layer by layer:
            interrupted in between, it is of no use any more.
        pool: as for ``load``: the experts move to a file in the cache directory that goes when they are closed. None:
            all stay in memory, as pages, and only the kernels are swapped.
        routing, format, eviction, progress: as for ``load``.

    Returns:
        What is then ``model.cachemoe`` too.

    Raises:
        InputError: for a model, pool or routing that cannot be, in one sentence.
    """
    experts = ModelExperts(model)
    routing = _strategy(routing, experts.shape)
    evict = eviction_policy(eviction)
    layout = experts.layout(format)
    for layer in moe_layers(model):
        check_experts(layer, layout.page_format, experts.transposed)
    with ExitStack() as stack:
        if pool is None:
            count = layout.layers * layout.experts
            with progress(f"packing {count} experts", count) as advance:
                pages = counted(experts.pages(layout.page_format), advance)
                engine = ResidentEngine.of_pages(layout, pages, model.device)
        else:
            capacity = slots_of(pool, experts.shape, layout.page_format.page_bytes)
            path = cache_directory() / f"swapped-{layout.model}-{os.getpid()}-{id(model)}.safetensors"
            pack(experts, layout, path, progress)
            try:
                file = stack.enter_context(ExpertStore(path))
            finally:
                path.unlink()  # what is open stays readable, and nothing is left behind however this ends
            for layer in range(layout.layers):
                experts.free(layer)
            engine = _engine(stack, file, capacity, model.device.type, evict, progress)
        PooledExperts(model, experts, layout, engine, routing, evict).keep(stack.pop_all())
    return model.cachemoe


def _engine(stack: ExitStack, store, capacity, device: str, evict: Callable, progress: Progress) -> OffloadEngine:
    """The engine over a file: through pinned memory where a GPU computes."""
    if device != "cpu":
        with progress("reading every page into pinned memory", store.pages) as advance:
            store = stack.enter_context(PinnedStore(store, advance))
    return stack.enter_context(OffloadEngine(store, capacity, device, evict=evict))


def slots_of(pool: str | int, shape: MoeShape, page_bytes: int) -> list[int]:
    """Slots of each MoE layer.

    Args:
        pool: as ``load`` takes it. Of a size in bytes as many pages as fit, spread evenly, the first layers one more.

    Raises:
        InputError: if it is none of these, or less than the K experts of a token in a layer.
    """
    layers, experts, k = len(shape.layers), shape.experts, shape.top_k
    text = str(pool).strip()
    if text.isdecimal():
        slots = [int(text)] * layers
    elif share := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text):
        slots = [round(float(share[1]) / 100 * experts)] * layers
    else:
        pages = min(int(size_of(text) / page_bytes), layers * experts)
        slots = [pages // layers + (layer < pages % layers) for layer in range(layers)]
    if not k <= min(slots) <= max(slots) <= experts:
        least, most = (size_text(layers * count * page_bytes) for count in (k, experts))
        raise InputError(
            f"a pool of {text} is {min(slots)} experts a layer: it must lie between the {k} that a token uses, {least} "
            f"in all layers, and the {experts} that there are, {most}"
        )
    return slots


def _strategy(routing: Strategy | str | None, shape: MoeShape) -> Strategy:
    if isinstance(routing, str):
        return Strategy.parse(routing, shape.experts, shape.top_k)
    routing = routing or Original()
    routing.check(shape.experts, shape.top_k)
    return routing


def checkpoint_folder(path: str | os.PathLike) -> Path:
    """The checkpoint's folder; of a hub id, what it has in the hub's cache, fetched if need be.

    Raises:
        InputError: if there is neither.
    """
    folder = Path(path)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=HUB_FILES))
    except Exception as error:  # of many kinds: no network, no such model, no right to it
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"there is no folder {path}, and the Hugging Face hub does not give a model of that name: {reason}"
        ) from error


@dataclass
class LayerCount:
    """What one MoE layer has counted.

    Args:
        layer: of the model's decoder.
    """

    layer: int
    slots: int
    selections: int = 0
    misses: int = 0

    @property
    def hit_rate(self) -> float:
        return 1 - self.misses / self.selections if self.selections else 0.0


class PooledExperts:
    """A model's experts, served from a pool of pages: what ``model.cachemoe`` is. Print it for its counters.

    Args:
        model: of transformers; its experts' parameters are not used any more.
        source: the ``Checkpoint`` or ``ModelExperts`` that the pages are of.
        layout: of the pages.
        engine: that has or fetches them.
        routing: see ``routing``.
        evict: eviction policy.

    Attributes:
        shape: of the MoE layers.
        fingerprint: of the experts' weights.
        layers: a ``LayerCount`` of each MoE layer.
        engine: the ``OffloadEngine`` or ``ResidentEngine``.

    Raises:
        InputError: if the model computes its experts, or routes, in a way that cachemoe does not know.
    """

    def __init__(
        self,
        model,
        source: Checkpoint | ModelExperts,
        layout: StoreLayout,
        engine: OffloadEngine | ResidentEngine,
        routing: Strategy,
        evict: Callable,
    ):
        self.engine, self.shape, self.fingerprint = engine, source.shape, layout.model
        self._owned = ExitStack()
        self._model, self._evict = model, evict
        self._rounded = rounds(layout.page_format, source.dtype)
        shape = self.shape
        self._swap: Swap | None = None
        layers = moe_layers(model)
        if len(layers) != len(shape.layers) or any(layer.count != shape.experts for layer in layers):
            raise InputError(
                f"{type(model).__name__} has {len(layers)} MoE layers of {layers[0].count} experts, and its checkpoint "
                f"{len(shape.layers)} of {shape.experts}"
            )
        for layer in layers:
            check_experts(layer, engine.page_format, source.transposed)
        self._states = _by_layer(engine.state)
        self._rules = None
        self.reset_counters()
        self.routing = routing
        model.cachemoe = self

    def keep(self, owned: ExitStack) -> None:
        """Close what is owned with this, or when the model is no more."""
        self._owned = owned
        weakref.finalize(self._model, owned.close)

    @property
    def routing(self) -> Strategy:
        """The routing strategy; set another between two tokens."""
        return self._routing

    @routing.setter
    def routing(self, routing: Strategy) -> None:
        routing.check(self.shape.experts, self.shape.top_k)
        exact = routing.label == EXACT
        if not exact and self._rules is None:
            self._rules = routing_rules(self._model)
        if self._swap is not None:
            self._swap.__exit__()
        self._routing, self._bias = routing, cache_bias([routing])
        if exact:
            self._swap = Swap(self._model, None, self._run, place=self._place)
        else:
            self._swap = Swap(self._model, self._route, self._run)
        self._swap.__enter__()

    @property
    def label(self) -> str:
        """What differs from the model: ``exact``, or which of routing and precision changed."""
        changes = [self.routing.label] if self.routing.label != EXACT else []
        return ", ".join(changes + [PRECISION_CHANGED] * self._rounded) or EXACT

    def resize(self, pool: str | int) -> None:
        """Change the pool between two tokens; see ``load``.

        Raises:
            InputError: as ``load``, or if all experts are in memory for good.
        """
        if not isinstance(self.engine, OffloadEngine):
            raise InputError("there is nothing to resize: every expert is in memory")
        slots = slots_of(pool, self.shape, self.engine.page_format.page_bytes)
        self.engine.resize(slots)
        for count, capacity in zip(self.layers, slots, strict=True):
            count.slots = capacity
        self._states = _by_layer(self.engine.state)

    def reset_counters(self) -> None:
        """Count anew; what is resident stays."""
        self.engine.counters = Counters()
        slots = self.engine.state.capacity.tolist()
        self.layers = [LayerCount(layer, count) for layer, count in zip(self.shape.layers, slots, strict=True)]

    def close(self) -> None:
        """Give the model its own routers back, end the engine's threads and close the store; the experts are gone."""
        if self._swap is not None:
            self._swap.__exit__()
            self._swap = None
        self._owned.close()

    def __str__(self) -> str:
        c, slots, page_format = self.counters, sum(count.slots for count in self.layers), self.engine.page_format
        pages = len(self.layers) * self.shape.experts
        rate = f" ({c.misses / c.selections:.1%})" if c.selections else ""
        return (
            f"pool: {slots} of {pages} experts ({slots / pages:.0%}), {size_text(slots * page_format.page_bytes)} of "
            f"{page_format.kind} pages\n"
            f"routing: {self.routing}; {self.label}\n"
            f"selections: {c.selections}, hits {c.hits}, misses {c.misses}{rate}\n"
            f"read: {size_text(c.bytes_read)} in {c.pages_read} pages, {c.stall_s:.2f} s waited for; experts computed "
            f"in {c.compute_s:.2f} s"
        )

    @property
    def counters(self) -> Counters:
        """Of all layers; see ``Counters``."""
        return self.engine.counters

    def _route(self, layer: int, logits: torch.Tensor, hidden: torch.Tensor) -> Routing:
        rule, k = self._rules[layer], self.routing.experts_used(self.shape.top_k)
        return choose(rule, logits[None].cpu(), self._states[layer], self._evict, k, self._bias)

    def _place(self, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> Routing:
        return route_cpu.place(ids[None].cpu(), weights[None].cpu(), self._states[layer], self._evict)

    def _run(self, layer: int, hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
        count, before = self.layers[layer], self.counters.misses
        y = self.engine.forward(layer, hidden.contiguous(), routing)
        count.selections += routing.ids.numel()
        count.misses += self.counters.misses - before
        return y


def counted(pages: Iterator[torch.Tensor], advance: Callable[[], None]) -> Iterator[torch.Tensor]:
    """The pages, each counted when it is taken."""
    for page in pages:
        yield page
        advance()


def _by_layer(state):
    """``[1, ...]`` of each layer, the same memory."""
    return [state[i : i + 1] for i in range(len(state.capacity))]
