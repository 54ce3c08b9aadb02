"""Pinned stores: the file's bytes, locked; refusals and failed reads leave nothing; no thread sees another's page."""

import errno
import gc
import os
import random
import re
import resource
import signal
import threading
import time
import weakref
from collections import OrderedDict
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cachemoe.kernels.fetch import fetch
from cachemoe.kernels.formats import PageFormat
from cachemoe.offload import locked_memory
from cachemoe.offload.carriers import ReadCarrier
from cachemoe.offload.errors import InputError
from cachemoe.offload.link import Link
from cachemoe.offload.pinned import PinnedLevel, PinnedStore
from cachemoe.offload.pool import ExpertPool
from cachemoe.offload.store import ExpertStore, StoreLayout, aligned_buffer, write_store

LAYERS, EXPERTS = 2, 4
LAYOUT = StoreLayout("a fingerprint", LAYERS, EXPERTS, PageFormat("bf16", 64, 40))
PAGES, SIZE = LAYERS * EXPERTS, LAYOUT.page_format.page_bytes
DATA = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (PAGES, SIZE), dtype=np.uint8))
KEYS = [divmod(index, EXPERTS) for index in range(PAGES)]
WATCHDOG_S = 30
locked_by_mlock = pytest.mark.skipif(
    torch.cuda.is_available() or not Path("/proc/self/status").exists(), reason="mlock, as Linux reports it"
)


class FailingStore(ExpertStore):
    """Reads of the offsets in ``failing`` leave rubbish in the buffer and raise."""

    failing: frozenset | set = frozenset()
    reads = 0

    def read_into(self, buffer, offset):
        self.reads += 1
        if offset in self.failing:
            np.frombuffer(buffer, np.uint8)[:] = 0xA5
            raise OSError(errno.EIO, "Input/output error")
        super().read_into(buffer, offset)


@pytest.fixture(autouse=True)
def watchdog():
    """Raises in a test that hangs, and every second thereafter, until it is out of every wait."""

    def hangs(*_):
        raise TimeoutError("the test hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, 2 * WATCHDOG_S, 1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "experts.safetensors"
    write_store(path, LAYOUT, DATA)
    return path


@pytest.fixture
def store(path):
    with FailingStore(path) as store:
        yield store


def read(store, layer, expert):
    buffer = np.zeros(SIZE, np.uint8)
    store.read_into(memoryview(buffer), store.offset(layer, expert))
    return torch.from_numpy(buffer)


def locked_bytes():
    gc.collect()  # what earlier tests left
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmLck:\s+(\d+) kB$", status, re.MULTILINE)[1]) * 1024


@contextmanager
def memory_lock_limit(size):
    """This process may lock no more than ``size`` bytes, even where it is root's."""
    limits, root = resource.getrlimit(resource.RLIMIT_MEMLOCK), os.geteuid() == 0
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (size, limits[1]))
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, limits)


def watch_allocations(monkeypatch):
    """Weak references to the memory of all stores made from now on."""
    owners = []

    def watched(size):
        buffer = aligned_buffer(size)
        owners.append(weakref.ref(buffer.base))
        return buffer

    monkeypatch.setattr(locked_memory, "aligned_buffer", watched)
    return owners


@contextmanager
def without_garbage_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def assert_one_sentence(error):
    assert "\n" not in str(error)
    assert ". " not in str(error)
    assert "None" not in str(error)


def start(function):
    """A future of what the function gives, in a thread that may hang without holding up the end of the process."""
    future = Future()

    def run():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def in_threads(*functions):
    """What each gives, all run at once; raises what one of them raised, and fails where one hangs."""
    futures = [start(function) for function in functions]
    assert not wait(futures, WATCHDOG_S).not_done, "a thread hangs"
    return [future.result() for future in futures]


def eventually(condition):
    deadline = time.monotonic() + WATCHDOG_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


# ------------------------------------------------------------------------------------------------------- pinned store


def test_every_page_lies_where_it_says(path):
    with ExpertStore(path) as store:
        whole = PinnedStore(store)
    with whole:
        assert (whole.layout, whole.pages, whole.page_bytes) == (LAYOUT, PAGES, SIZE)
        assert torch.equal(whole.memory, DATA)
        assert whole.memory.data_ptr() % 4096 == 0
        for index, key in enumerate(KEYS):
            assert whole.page(*key).data_ptr() == whole.memory.data_ptr() + whole.offset(*key)
            assert torch.equal(whole.page(*key), DATA[index])
            assert torch.equal(read(whole, *key), DATA[index])


@given(st.integers(0, PAGES * SIZE), st.integers(0, 3 * SIZE))
def test_any_bytes_of_the_memory_can_be_read(path, offset, count):
    with ExpertStore(path) as store, PinnedStore(store) as whole:
        buffer = bytearray(count)
        if offset + count > PAGES * SIZE:
            with pytest.raises(OSError, match="are not in the"):
                whole.read_into(memoryview(buffer), offset)
        elif count:
            whole.read_into(memoryview(buffer), offset)
            assert buffer == DATA.numpy().tobytes()[offset : offset + count]


def test_bytes_before_the_first_are_not_those_before_the_last(store):
    with PinnedStore(store) as whole, pytest.raises(OSError):
        whole.read_into(memoryview(bytearray(16)), -4096)


def test_advance_is_called_for_each_page(store):
    calls = []
    PinnedStore(store, lambda: calls.append(1)).close()
    assert len(calls) == PAGES


def fetch_everything(store):
    """What a link over the store brings, page by page of several chunks."""
    pool = ExpertPool(PAGES, LAYOUT.page_format)
    carrier = ReadCarrier(store, pool)
    carrier.chunk_bytes = 4096
    with Link([carrier]) as link:
        assert len(list(link.landed([link.request(*key, frame) for frame, key in enumerate(KEYS)]))) == PAGES
    return pool.pages


def test_a_link_reads_either_as_it_reads_the_file(store):
    with PinnedStore(store) as whole, PinnedLevel(store, 3) as level:
        assert torch.equal(fetch_everything(whole), DATA)
        assert torch.equal(fetch_everything(level), DATA)


def test_a_lease_of_either_is_the_page(store):
    with PinnedStore(store) as whole, PinnedLevel(store, 3) as level:
        for key, page in zip(KEYS, DATA, strict=True):
            with whole.lease(*key) as one, level.lease(*key) as other:
                assert torch.equal(one, page)
                assert torch.equal(other, page)


@locked_by_mlock
def test_the_memory_is_locked_until_it_is_closed(store):
    before = locked_bytes()
    whole, level = PinnedStore(store), PinnedLevel(store, 3)
    assert locked_bytes() == before + (PAGES + 3) * SIZE
    for opened, left in ((whole, 3), (level, 0)):
        opened.close()
        opened.close()
        assert locked_bytes() == before + left * SIZE


@pytest.mark.parametrize("make", [PinnedStore, lambda store: PinnedLevel(store, 3)], ids=["store", "level"])
def test_the_memory_goes_with_its_last_view(store, monkeypatch, make):
    owners = watch_allocations(monkeypatch)
    with without_garbage_collection():
        opened = make(store)
        view = opened.memory[1] if make is PinnedStore else opened.lease(0, 0).__enter__()
        opened.close()
        assert owners[0]() is not None
        view.fill_(1)
        del view
        assert owners[0]() is None


@locked_by_mlock
def test_memory_that_nobody_closed_is_unlocked_when_it_goes(store):
    before = locked_bytes()
    whole = PinnedStore(store)
    view = whole.memory[0]
    del whole
    assert locked_bytes() > before
    del view
    assert locked_bytes() == before


def test_nothing_can_be_read_once_closed(store):
    whole, level = PinnedStore(store), PinnedLevel(store, 3)
    with level.lease(0, 0):
        pass
    whole.close()
    level.close()
    assert whole.memory.shape == (0, SIZE)
    with pytest.raises(IndexError):
        whole.page(0, 0)
    for closed in (whole, level):
        with pytest.raises(OSError):
            read(closed, 0, 0)


@pytest.mark.parametrize("make", [PinnedStore, lambda store: PinnedLevel(store, PAGES)], ids=["store", "level"])
def test_more_than_the_machine_has_is_refused_before_it_is_allocated(store, monkeypatch, make):
    owners = watch_allocations(monkeypatch)
    monkeypatch.setattr(locked_memory, "available_memory", lambda: PAGES * SIZE - 1)
    with pytest.raises(InputError, match=r"0\.00 GB of page-locked memory .* choose a smaller") as caught:
        make(store)
    assert_one_sentence(caught.value)
    assert (owners, store.reads) == ([], 0)


@locked_by_mlock
@pytest.mark.parametrize("make", [PinnedStore, lambda store: PinnedLevel(store, PAGES)], ids=["store", "level"])
def test_more_than_the_limit_of_locked_memory_is_refused(store, monkeypatch, make):
    owners, before = watch_allocations(monkeypatch), locked_bytes()
    with without_garbage_collection(), memory_lock_limit(before + PAGES * SIZE - 4096):
        with pytest.raises(InputError, match=r"refuses to page-lock 0\.00 GB of memory .* raise `ulimit -l`") as caught:
            make(store)
        assert owners[0]() is None
    assert_one_sentence(caught.value)
    assert (locked_bytes(), store.reads) == (before, 0)


def test_memory_that_cannot_be_allocated_is_refused(store, monkeypatch):
    def refuse(_):
        raise MemoryError("Unable to allocate")

    monkeypatch.setattr(locked_memory, "aligned_buffer", refuse)
    with pytest.raises(InputError, match="refuses to page-lock") as caught:
        PinnedStore(store)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("failing", [0, 5, PAGES - 1])
def test_a_failed_read_while_filling_leaves_nothing(store, monkeypatch, failing):
    store.failing = {store.offset(*KEYS[failing])}
    owners, threads = watch_allocations(monkeypatch), threading.active_count()
    with without_garbage_collection():
        with pytest.raises(OSError, match="Input/output error"):
            PinnedStore(store)
        assert owners[0]() is None
    assert threading.active_count() == threads


@locked_by_mlock
def test_an_interrupt_while_filling_unlocks(store):
    def interrupt():
        raise KeyboardInterrupt

    before, threads = locked_bytes(), threading.active_count()
    with pytest.raises(KeyboardInterrupt) as caught:
        PinnedStore(store, interrupt)
    assert (locked_bytes(), threading.active_count()) == (before, threads)
    assert caught  # while its traceback still holds the store


# ------------------------------------------------------------------------------------------------------- pinned level


class PlainLevel:
    """The level in plain Python: LRU over keys."""

    def __init__(self, slots):
        self.slots, self.held, self.hits, self.misses = slots, OrderedDict(), 0, 0

    def lease(self, key, fails):
        """Whether the lease succeeds."""
        if key in self.held:
            self.hits += 1
            self.held.move_to_end(key)
            return True
        self.misses += 1
        if len(self.held) == self.slots:
            self.held.popitem(last=False)
        if not fails:
            self.held[key] = True
        return not fails


@given(st.integers(1, PAGES), st.lists(st.tuples(st.sampled_from(KEYS), st.booleans(), st.booleans()), max_size=40))
def test_one_thread_sees_what_plain_lru_would_hold(path, slots, leases):
    model = PlainLevel(slots)
    with FailingStore(path) as store, PinnedLevel(store, slots) as level:
        for key, fails, copied in leases:
            index = KEYS.index(key)
            store.failing = {store.offset(*key)} if fails else set()
            if not model.lease(key, fails):
                with pytest.raises(OSError, match="Input/output error"), level.lease(*key):
                    pass
            elif copied:
                assert torch.equal(read(level, *key), DATA[index])
            else:
                with level.lease(*key) as page:
                    assert torch.equal(page, DATA[index])
            assert (level.hits, level.misses) == (model.hits, model.misses)
        assert store.reads == model.misses


@given(st.sampled_from(KEYS), st.integers(0, SIZE - 1), st.integers(1, SIZE))
def test_any_bytes_of_a_page_can_be_read(path, key, start, count):
    with ExpertStore(path) as store, PinnedLevel(store, 2) as level:
        assert level.offset(*key) == store.offset(*key)
        buffer = bytearray(count)
        if start + count > SIZE:
            with pytest.raises(ValueError, match="beyond"):
                level.read_into(memoryview(buffer), level.offset(*key) + start)
        else:
            level.read_into(memoryview(buffer), level.offset(*key) + start)
            assert buffer == DATA[KEYS.index(key)].numpy().tobytes()[start : start + count]


@pytest.mark.parametrize("key", [(-1, 0), (0, -1), (LAYERS, 0), (0, EXPERTS)])
def test_a_page_that_does_not_exist(store, key):
    with PinnedLevel(store, 2) as level:
        with pytest.raises(IndexError, match="no page of layer"), level.lease(*key):
            pass
        assert level.misses == 0


@pytest.mark.parametrize("slots", [-1, 0, PAGES + 1])
def test_too_few_or_too_many_slots(store, slots):
    with pytest.raises(InputError, match=f"choose 1 to {PAGES}") as caught:
        PinnedLevel(store, slots)
    assert_one_sentence(caught.value)


class GatedStore(FailingStore):
    """Every read waits until ``gate`` is set."""

    def __init__(self, path):
        super().__init__(path)
        self.gate = threading.Event()

    def read_into(self, buffer, offset):
        assert self.gate.wait(WATCHDOG_S)
        super().read_into(buffer, offset)


@pytest.mark.parametrize("fails", [False, True])
def test_an_absent_page_is_read_once_for_all_who_ask(path, fails):
    with GatedStore(path) as store, PinnedLevel(store, 1) as level:
        store.failing = {store.offset(1, 2)} if fails else set()

        def ask():
            try:
                return torch.equal(read(level, 1, 2), DATA[KEYS.index((1, 2))])
            except OSError as error:
                return str(error)

        def open_gate():
            eventually(lambda: level.hits + level.misses == 5)
            store.gate.set()

        *answers, _ = in_threads(*[ask] * 5, open_gate)
        assert (store.reads, level.misses, level.hits) == (1, 1, 4)
        if fails:
            assert all("Input/output error" in answer for answer in answers)
            store.failing = set()
        else:
            assert answers == [True] * 5
        assert torch.equal(read(level, 1, 2), DATA[KEYS.index((1, 2))])
        assert torch.equal(read(level, 0, 0), DATA[0])  # the one slot is free


def test_who_waits_for_a_page_has_it_while_its_reader_has(path):
    with GatedStore(path) as store, PinnedLevel(store, 1) as level:
        both = threading.Barrier(2)

        def meet():
            with level.lease(0, 3) as page:
                both.wait(WATCHDOG_S)
                return page.data_ptr()

        futures = [start(meet), start(meet)]
        eventually(lambda: level.hits + level.misses == 2)
        store.gate.set()
        assert len({future.result(WATCHDOG_S) for future in futures}) == 1


def test_a_lease_waits_where_every_slot_is_leased(store):
    with PinnedLevel(store, 2) as level:
        with level.lease(0, 0) as first:
            with level.lease(0, 1):
                third = start(lambda: read(level, 0, 2))
                assert wait([third], 0.05).not_done
                assert (level.misses, store.reads) == (2, 2)
            assert torch.equal(third.result(WATCHDOG_S), DATA[2])
            assert torch.equal(read(level, 0, 1), DATA[1])
            assert torch.equal(first, DATA[0])
        assert level.misses == 4


def test_closing_wakes_who_waits_for_a_slot(store):
    level = PinnedLevel(store, 1)
    with level.lease(0, 0) as page:
        waiting = start(lambda: read(level, 0, 1))
        wait([waiting], 0.02)
        level.close()
        with pytest.raises(OSError, match="closed"):
            waiting.result(WATCHDOG_S)
        assert torch.equal(page, DATA[0])


def test_a_read_that_fails_after_closing_says_so(path):
    with GatedStore(path) as store:
        level = PinnedLevel(store, 2)
        store.failing = {store.offset(0, 1)}
        reading = start(lambda: read(level, 0, 1))
        eventually(lambda: level.misses)
        level.close()
        store.gate.set()
        with pytest.raises(OSError, match="Input/output error"):
            reading.result(WATCHDOG_S)


class ErraticStore(ExpertStore):
    """Reads that come in two halves, late, or not at all."""

    def __init__(self, path, seed):
        super().__init__(path)
        self.random, self.calls, self.reading = random.Random(seed), 0, {}

    def read_into(self, buffer, offset):
        self.calls += 1
        assert self.reading.setdefault(offset, threading.get_ident()) == threading.get_ident()
        half = len(buffer) // 2
        super().read_into(buffer[:half], offset)
        time.sleep(self.random.choice([0, 0, 0.0005, 0.002]))
        fails = self.random.random() < 0.2
        if not fails:
            super().read_into(buffer[half:], offset + half)
        del self.reading[offset]
        if fails:
            raise OSError(errno.EIO, "Input/output error")


@settings(max_examples=15)
@given(st.integers(1, PAGES), st.integers(2, 6), st.integers(0, 2**32))
@example(slots=1, threads=6, seed=0)
def test_no_thread_sees_another_page(path, slots, threads, seed):
    def work(number):
        choice, leased, failed = random.Random(seed + number), 0, 0
        for _ in range(40):
            index = choice.randrange(PAGES)
            try:
                if choice.random() < 0.3:
                    assert torch.equal(read(level, *KEYS[index]), DATA[index])
                else:
                    with level.lease(*KEYS[index]) as page:
                        assert torch.equal(page, DATA[index])
                        time.sleep(choice.choice([0, 0, 0.0005]))
                        assert torch.equal(page, DATA[index])
                leased += 1
            except OSError:
                failed += 1
        return leased + failed

    with ErraticStore(path, seed) as store, PinnedLevel(store, slots) as level:
        assert in_threads(*[lambda n=n: work(n) for n in range(threads)]) == [40] * threads
        assert (level.hits + level.misses, level.misses) == (40 * threads, store.calls)
        for index, key in enumerate(KEYS):  # every slot can be had again
            eventually(lambda key=key, index=index: can_be_read(level, key, index))


def can_be_read(level, key, index):
    try:
        return torch.equal(read(level, *key), DATA[index])
    except OSError:
        return False


# --------------------------------------------------------------------------------------------------------------- CUDA


class Cudart:
    """Stands in for torch's binding of the CUDA runtime."""

    def __init__(self, monkeypatch, code=0):
        self.code, self.calls = code, []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100 * (device == 2))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.calls.append(f"synchronize {device}"))
        monkeypatch.setattr(torch, "ones", lambda *_, **__: self.calls.append("launch"))

    def cudaHostRegister(self, address, size, flags):
        self.calls.append((address, size, flags))
        return self.code

    def cudaHostUnregister(self, address):
        self.calls.append(address)
        return 0

    def cudaGetErrorString(self, code):
        return {2: "out of memory"}[code]


def test_where_there_is_cuda_the_memory_is_registered_with_it(store, monkeypatch):
    cudart = Cudart(monkeypatch)
    with PinnedStore(store) as whole:
        address = whole.memory.data_ptr()
        assert cudart.calls == [(address, PAGES * SIZE, 0)]
    whole.close()
    assert cudart.calls[1:] == ["synchronize 0", "synchronize 2", address]  # those in use


def test_what_cuda_refuses_is_not_unregistered(store, monkeypatch):
    owners, cudart = watch_allocations(monkeypatch), Cudart(monkeypatch, code=2)
    with without_garbage_collection():
        with pytest.raises(InputError, match="CUDA says out of memory") as caught:
            PinnedLevel(store, 2)
        assert owners[0]() is None
    assert_one_sentence(caught.value)
    assert cudart.calls[1:] == ["launch"]


@pytest.mark.gpu
def test_the_memory_is_pinned_for_cuda(store):
    with PinnedStore(store) as whole, PinnedLevel(store, 2) as level:
        assert whole.memory.is_pinned() and whole.page(1, 3).is_pinned()
        with level.lease(1, 1) as page:
            assert page.is_pinned()
            copied = page.to("cuda", non_blocking=True)
            torch.cuda.synchronize()
        assert torch.equal(copied.cpu(), DATA[KEYS.index((1, 1))])
        view = whole.memory[0]
    assert not view.is_pinned()


@pytest.mark.gpu
@pytest.mark.kernel
def test_fetch_reads_the_pages_where_they_lie(store):
    pool = torch.zeros(3, SIZE, dtype=torch.uint8, device="cuda")
    lists = [torch.tensor(numbers, device="cuda") for numbers in ([5, 0, 7], [2, 0, 1], [3])]
    with PinnedStore(store) as whole:
        fetch(whole.memory, pool, *lists)
    assert torch.equal(pool.cpu(), DATA[[0, 7, 5]])


@pytest.mark.gpu
def test_a_refusal_by_cuda_leaves_no_error_behind(store, monkeypatch):
    buffer = aligned_buffer(PAGES * SIZE)
    monkeypatch.setattr(locked_memory, "aligned_buffer", lambda _: buffer)
    with PinnedStore(store) as whole:
        with pytest.raises(InputError, match="CUDA says"):  # the memory is registered already
            PinnedStore(store)
        assert whole.memory.is_pinned()
        assert torch.ones(3, device="cuda").sum() == 3
