"""The machine that a figure comes from: what it is, and how fast its disk and memory read."""

import os
import platform
import random
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import torch

from cachemoe.kernels.reference import Routing
from cachemoe.offload.engine import Counters, OffloadEngine, ResidentEngine
from cachemoe.offload.link import CHUNK_BYTES, DEPTH
from cachemoe.offload.store import ExpertStore, aligned_buffer


def describe() -> dict:
    """Processor, memory, threads, versions and date."""
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    packages = ("cachemoe", "torch", "transformers", "safetensors", "numpy")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }


def disk_bandwidth(store: ExpertStore, pages: int = 96) -> float:
    """Bytes a second of bare reads of random pages at the link's queue depth and chunk size: the engine's bound."""
    size = store.page_bytes
    buffers = [memoryview(aligned_buffer(size)) for _ in range(DEPTH)]
    draw = random.Random(0)
    layout = store.layout
    offsets = [store.offset(draw.randrange(layout.layers), draw.randrange(layout.experts)) for _ in range(pages)]
    chunks = [(i % DEPTH, offset, start) for i, offset in enumerate(offsets) for start in range(0, size, CHUNK_BYTES)]

    def read(chunk):
        buffer, offset, start = chunk
        store.read_into(buffers[buffer][start : start + CHUNK_BYTES], offset + start)

    with ThreadPoolExecutor(DEPTH) as readers:
        start = perf_counter()
        list(readers.map(read, chunks))
        return pages * size / (perf_counter() - start)


def engine_bandwidth(store: ExpertStore, slots: int = 24) -> float:
    """Bytes a second at which an engine fills its pool from the store, to be held against ``disk_bandwidth``."""
    layers, experts = store.layout.layers, store.layout.experts
    with OffloadEngine(store, [min(slots, experts)] * layers) as engine:
        draw = random.Random(1)
        for layer in range(layers):
            ids = torch.tensor(draw.sample(range(experts), min(slots, experts)))
            engine.state.expert_of[layer] = ids
            engine.state.slot_of[layer, ids] = torch.arange(len(ids))
        start = perf_counter()
        engine.fill()
        return layers * len(ids) * store.page_bytes / (perf_counter() - start)


def memory_bandwidth(size: int = 1 << 29) -> float:
    """Bytes a second at which torch's threads read memory, the best of three passes over 512 MiB."""
    values = torch.ones(size // 4, dtype=torch.float32)
    seconds = []
    for _ in range(3):
        start = perf_counter()
        values.sum()
        seconds.append(perf_counter() - start)
    return size / min(seconds)


def expert_bandwidth(engine: ResidentEngine, experts: int, top_k: int, calls: int = 60) -> float:
    """Bytes of expert weights a second that decode computes with when every page is in memory."""
    layers = engine.state.slot_of.shape[0]
    draw = random.Random(0)
    x = torch.randn(1, engine.page_format.hidden, generator=torch.Generator().manual_seed(0))
    x = x.to(engine.page_format.compute_dtype)
    engine.counters = Counters()
    for call in range(calls):
        ids = torch.tensor([[draw.sample(range(experts), top_k)]])
        routing = Routing(ids, torch.full(ids.shape, 1 / top_k), ids, torch.ones(ids.shape, dtype=torch.bool))
        engine.forward(call % layers, x, routing)
    return calls * top_k * engine.page_format.weight_bytes / engine.counters.compute_s
