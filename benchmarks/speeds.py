"""How fast the machine's disk, memory, link and matmuls are."""

import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter

import torch

from cachemoe.benchmarks.timing import plan_round
from cachemoe.kernels.state import Routing
from cachemoe.offload.carriers import READERS, chunk_size
from cachemoe.offload.counters import Counters
from cachemoe.offload.engine import OffloadEngine
from cachemoe.offload.resident_engine import ResidentEngine
from cachemoe.offload.store import Store, aligned_buffer

MOST_MATMUL_S = 0.1


def store_bandwidths(store: Store, slots: int = 12) -> dict[str, list[float]]:
    """Bytes a second at which pages are read: bare, and by an engine that fills its pool; three times each, in turns.

    Both read the same number of random pages at the link's queue depth and chunk size.
    """
    layers, experts, size = store.layout.layers, store.layout.experts, store.page_bytes
    slots, piece = min(slots, experts), chunk_size(size, READERS)
    pages = layers * slots
    draw = random.Random(0)
    measured: dict[str, list[float]] = {"bare": [], "engine": []}
    memory = memoryview(aligned_buffer(pages * size))
    with ThreadPoolExecutor(READERS) as readers, OffloadEngine(store, [slots] * layers) as engine:
        list(readers.map(time.sleep, [0.01] * READERS))  # the threads start before the clock does

        def read(chunk):
            start, offset = chunk
            store.read_into(memory[start : start + min(piece, size - start % size)], offset)

        for _ in range(4):  # the first touches the memory, and does not count
            chosen = [(layer, draw.sample(range(experts), slots)) for layer in range(layers)]
            offsets = [store.offset(layer, e) for layer, ids in chosen for e in ids]
            chunks = [(i * size + c, o + c) for i, o in enumerate(offsets) for c in range(0, size, piece)]
            start = perf_counter()
            list(readers.map(read, chunks))
            measured["bare"].append(pages * size / (perf_counter() - start))

            engine.state.page_of.fill_(-1)
            engine.fill()  # empties the pool
            for layer, ids in chosen:
                engine.state.page_of[layer] = torch.tensor(ids)
            start = perf_counter()
            engine.fill()
            measured["engine"].append(pages * size / (perf_counter() - start))
    return {name: values[1:] for name, values in measured.items()}


def memory_bandwidth(size: int = 1 << 29) -> float:
    """Bytes a second at which torch's threads read memory, the best of three passes over 512 MiB."""
    values = torch.ones(size // 4, dtype=torch.float32)
    seconds = []
    for _ in range(3):
        start = perf_counter()
        values.sum()
        seconds.append(perf_counter() - start)
    return size / min(seconds)


def device_copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes a second, read and written both counted, of the best of ten copies of 1 GiB within the GPU's memory."""
    source, target = (torch.ones(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * size / min(_copy_seconds(source, target) for _ in range(10))


def pinned_copy_bandwidth(size: int = 1 << 29) -> float:
    """Bytes a second of the best of ten linear copies of 512 MiB from pinned host memory to the GPU."""
    source = torch.ones(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device="cuda")
    return size / min(_copy_seconds(source, target) for _ in range(10))


def _copy_seconds(source: torch.Tensor, target: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    target.copy_(source, non_blocking=True)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def matmul_rate(device: torch.device) -> float:
    """Operations a second, two for each multiplication, of the best of five bfloat16 matmuls of square matrices."""
    best = 0.0
    for side in (8192,) if device.type == "cuda" else (512, 2048):
        generator = torch.Generator(device).manual_seed(0)
        a, b = (torch.randn(side, side, generator=generator, device=device).bfloat16() for _ in range(2))
        seconds = []
        for _ in range(6):  # the first sets the library up, and does not count
            start = perf_counter()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(perf_counter() - start)
        best = max(best, 2 * side**3 / min(seconds[1:]))
        if min(seconds) > MOST_MATMUL_S:  # a processor without bfloat16: the larger matrices would take minutes
            break
    return best


def expert_bandwidth(engine: ResidentEngine, experts: int, top_k: int, device: str = "cpu", calls: int = 60) -> float:
    """Bytes of expert weights a second that decode computes with when every page is in memory, the median of three.

    On a GPU the calls are in a graph: neither Python nor launches are part of what the weights' bytes take.
    """
    layers, draw = engine.state.slot_of.shape[0], random.Random(0)
    x = torch.randn(1, engine.page_format.hidden, generator=torch.Generator().manual_seed(0))
    x = x.to(device, engine.page_format.compute_dtype)
    chosen = [torch.tensor([[draw.sample(range(experts), top_k)]]).to(device) for _ in range(calls)]
    runs = [partial(engine.forward, i % layers, x, Routing.all_hits(ids)) for i, ids in enumerate(chosen)]
    turn = plan_round(runs, torch.device(device), capturable=True)
    turns = max(1, calls // turn.calls)
    measured = []
    for _ in range(5):  # two warm up: memory that was just filled is slower at first
        start = perf_counter()
        for _ in range(turns):
            turn.run()
        measured.append(turns * turn.calls * top_k * engine.page_format.weight_bytes / (perf_counter() - start))
    engine.counters = Counters()
    return statistics.median(measured[2:])
