"""The engines against the reference arithmetic, under every residency, wave and fault."""

import faulthandler
import os
import random
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachemoe.kernels import reference_experts, reference_route
from cachemoe.kernels.formats import PageFormat
from cachemoe.kernels.policy import ORIGINAL
from cachemoe.kernels.route import route
from cachemoe.kernels.state import Routing
from cachemoe.moe.strategies import CachePrior, Strategy, policy_of
from cachemoe.offload import engine as engines
from cachemoe.offload import pool, staging, waves
from cachemoe.offload.errors import InputError
from cachemoe.offload.link import Pacing
from cachemoe.offload.pinned import PinnedLevel, PinnedStore
from cachemoe.offload.residency import least_recently_used
from cachemoe.offload.resident_engine import ResidentEngine
from cachemoe.offload.store import ExpertStore, StoreLayout, write_store

LAYERS, EXPERTS, TOP_K, FORMAT = 2, 7, 3, PageFormat("bf16", 32, 32)


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(LAYERS, EXPERTS, 64, 32, generator=generator).bfloat16()
    down = torch.randn(LAYERS, EXPERTS, 32, 32, generator=generator).bfloat16()
    return gate_up / 4, down / 4


@pytest.fixture(scope="module")
def store(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "store.safetensors"
    gate_up, down = weights
    pages = (FORMAT.pack(gate_up[i, e], down[i, e]) for i in range(LAYERS) for e in range(EXPERTS))
    write_store(path, StoreLayout("test", LAYERS, EXPERTS, FORMAT), pages)
    with ExpertStore(path) as opened:
        yield opened


class FaultyStore:
    """A store whose reads are slow or fail as told, page by page in the order they are asked for."""

    def __init__(self, store, faults):
        self._store, self._faults, self._lock = store, iter(faults), threading.Lock()

    def __getattr__(self, name):
        return getattr(self._store, name)

    def read_into(self, buffer, offset):
        with self._lock:
            fault = next(self._faults, "none")
        if fault == "fail":
            # Half a page of something else, then the error: as a real failed read may leave the slot.
            buffer[: len(buffer) // 2] = b"\x7f" * (len(buffer) // 2)
            raise OSError("injected")
        if fault == "slow":
            time.sleep(0.003)
        self._store.read_into(buffer, offset)


def logits_of(seed, tokens):
    return torch.randn(1, tokens, EXPERTS, generator=torch.Generator().manual_seed(seed))


def step(engine, weights, layer, seed, tokens, policy=ORIGINAL):
    """Route and run one call; returns the engine's output and the reference's."""
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed))
    offloads = isinstance(engine, engines.OffloadEngine)
    state = engine.caches(layer) if offloads else engine.state[layer : layer + 1]
    routing = reference_route.route(logits_of(seed, tokens), state, least_recently_used, TOP_K, policy)
    dense = {"gate_up": weights[0][layer], "down": weights[1][layer]}
    expected = reference_experts.experts(x, routing.ids[0], routing.weights[0], dense, FORMAT)
    return engine.forward(layer, x, routing), expected


def assert_consistent(engine):
    """The page table is a bijection on the held pages, and says of every slot what the engine holds there."""
    for layer, held in enumerate(engine._frames.held):
        assert engine.state.page_of[layer, : len(held)].tolist() == list(held)
        assert (engine.state.page_of[layer, len(held) :] == -1).all()
        table = {e: s for e, s in enumerate(engine.state.slot_of[layer].tolist()) if s >= 0}
        assert table == {e: s for s, e in enumerate(held) if e >= 0}

    frames = [frame for frames in engine._frames.of_slot for frame in frames]
    if engine._staging is not None:
        staging = engine._staging
        frames += staging._free[0]
        frames += [transfer.frame for transfer in (*staging._ahead.values(), *staging._dropped)]
    assert sorted(frames) == list(range(len(engine._pool.pages)))  # each once, none lost


class Guess:
    """Predicts at random, more often rightly: layers are called in turn, with ``logits_of`` the call's number."""

    ahead = 1

    def __init__(self, seed):
        self._draw, self._call = random.Random(seed), 0

    def observe(self, layer, ids):
        self._call += 1

    def predict(self, layer, gate_input):
        right = logits_of(self._call, 1)[0, 0].topk(TOP_K).indices.tolist()
        return [
            ((layer + 1) % LAYERS, [e if self._draw.random() < 0.7 else self._draw.randrange(EXPERTS) for e in right])
        ]


class Foretells:
    """After layer 0, that layer 1 will choose these."""

    ahead = 1

    def __init__(self, experts):
        self._experts = experts

    def observe(self, layer, ids):
        pass

    def predict(self, layer, gate_input):
        return [(1, self._experts)] if layer == 0 else []


def foreseeing(store, capacity, prefetcher, **options):
    engine = engines.OffloadEngine(store, capacity, staging=3, **options)
    engine.prefetcher = prefetcher
    return engine


@pytest.fixture(autouse=True)
def admit_all(monkeypatch):
    """Tiny pages and short calls: what is worth asking for is tested apart."""
    monkeypatch.setattr(staging, "lands_in_time", lambda *_: True)


@pytest.fixture(autouse=True)
def watchdog():
    """A test that hangs fails, and says where."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


calls = st.lists(st.tuples(st.integers(0, LAYERS - 1), st.sampled_from([1, 1, 1, 2, 5, 20])), min_size=1, max_size=8)
capacities = st.lists(st.integers(TOP_K, EXPERTS), min_size=LAYERS, max_size=LAYERS)


DROPPING, BEST_ALONE = (policy_of(Strategy("random-drop", p)) for p in (0.5, 1.0))
policies = st.sampled_from([ORIGINAL, policy_of(CachePrior(0.4, 1)), DROPPING, BEST_ALONE])


@given(calls=calls, capacity=capacities, policy=policies)
def test_outputs_are_the_references(store, weights, calls, capacity, policy):
    with engines.OffloadEngine(store, capacity) as engine:
        for seed, (layer, tokens) in enumerate(calls):
            y, expected = step(engine, weights, layer, seed, tokens, policy)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            assert_consistent(engine)
        counters = engine.counters
        assert counters.hits + counters.misses == counters.selections
        assert counters.selections + counters.drops == TOP_K * sum(tokens for _, tokens in calls)
        assert (counters.drops > 0) == (policy is BEST_ALONE) or policy is DROPPING
        assert counters.bytes_read == counters.pages_read * FORMAT.page_bytes
        assert counters.calls == len(calls)


@given(calls=calls, capacity=capacities)
def test_many_tokens_leave_the_experts_that_stepping_leaves(store, weights, calls, capacity):
    with engines.OffloadEngine(store, capacity) as engine:
        for seed, (layer, tokens) in enumerate(calls):
            stepped = engine.state[layer : layer + 1].clone()
            reference_route.route(logits_of(seed, tokens), stepped, least_recently_used, TOP_K)
            step(engine, weights, layer, seed, tokens)
            assert torch.equal(engine.state[layer].resident(), stepped.resident()[0])


@given(calls=calls, capacity=capacities)
def test_no_call_computes_more_than_it_tells_the_kernels(store, weights, calls, capacity):
    """On a GPU what lies beyond would not be computed."""
    with engines.OffloadEngine(store, capacity) as engine:
        run, told = engine._compute, []

        def checked(x, frames, gates, out, pending=None, partial=None, finish=True, most=None, **levels):
            if most is not None:
                chosen = frames[pending]
                assert chosen.numel() <= most[0] and len(chosen.unique()) <= most[1]
                told.append(most)
            run(x, frames, gates, out, pending, partial, finish, most, **levels)

        engine._compute, checked.takes = checked, run.takes
        for seed, (layer, tokens) in enumerate(calls):
            torch.testing.assert_close(*step(engine, weights, layer, seed, tokens))
            assert bool(told) == (tokens > 1)
            told.clear()


@given(seeds=st.lists(st.integers(0, 99), min_size=1, max_size=12), capacity=capacities)
def test_decode_is_bit_identical_to_resident_under_eviction(store, weights, seeds, capacity):
    resident = ResidentEngine(store, [EXPERTS] * LAYERS)
    with engines.OffloadEngine(store, capacity) as engine:
        for i, seed in enumerate(seeds):
            y, _ = step(engine, weights, i % LAYERS, seed, 1)
            expected, _ = step(resident, weights, i % LAYERS, seed, 1)
            assert torch.equal(y, expected)


def test_decode_misses_are_the_pages_read(store, weights):
    with engines.OffloadEngine(store, [TOP_K] * LAYERS) as engine:
        for seed in range(20):
            step(engine, weights, seed % LAYERS, seed, 1)
        assert 0 < engine.counters.misses == engine.counters.pages_read


def test_many_tokens_read_each_missing_expert_once(store, weights):
    with engines.OffloadEngine(store, [EXPERTS, EXPERTS]) as engine:
        step(engine, weights, 0, 0, 50)
        assert engine.counters.pages_read == EXPERTS == engine.counters.misses


@given(
    faults=st.lists(st.sampled_from(["none", "none", "slow", "fail"]), max_size=40),
    calls=calls,
    capacity=capacities,
)
def test_faults_give_the_exact_output_or_an_exception(store, weights, faults, calls, capacity):
    with engines.OffloadEngine(FaultyStore(store, faults), capacity) as engine:
        for seed, (layer, tokens) in enumerate(calls):
            try:
                y, expected = step(engine, weights, layer, seed, tokens)
            except OSError as error:
                assert str(error) == "injected"
            else:
                torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            assert_consistent(engine)


def test_a_failed_read_raises_and_the_next_call_reads_again(store, weights):
    with engines.OffloadEngine(FaultyStore(store, ["fail"]), [TOP_K] * LAYERS) as engine:
        with pytest.raises(OSError, match="injected"):
            step(engine, weights, 0, 0, 1)
        y, expected = step(engine, weights, 0, 0, 1)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_a_page_is_not_used_before_it_has_landed(store, weights):
    with engines.OffloadEngine(FaultyStore(store, ["slow"] * 100), [TOP_K] * LAYERS) as engine:
        engine._pool.pages.fill_(0xFF)  # NaN in bfloat16
        for seed in range(6):
            y, expected = step(engine, weights, 0, seed, 1)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_fill_brings_what_the_state_says(store, weights):
    with engines.OffloadEngine(store, [4, 5]) as engine:
        engine.state[0].slot_of[torch.tensor([2, 6])] = torch.tensor([3, 0])
        engine.state[0].page_of[torch.tensor([3, 0])] = torch.tensor([2, 6])
        engine.fill()
        assert sorted(engine._frames.held[0]) == [-1, -1, 2, 6]
        assert_consistent(engine)


def test_fill_keeps_the_pages_it_has(store, weights):
    with engines.OffloadEngine(store, [4, 4]) as engine:
        reads = []
        request = engine._link.request
        engine._link.request = lambda layer, e, *rest, **paced: reads.append(e) or request(layer, e, *rest, **paced)
        for experts in ([0, 1, 2, 3], [3, 2, 1, 5]):
            engine.state.slot_of[0] = -1
            engine.state.slot_of[0, torch.tensor(experts)] = torch.arange(4)
            engine.state.page_of[0] = torch.tensor(experts)
            engine.fill()
            assert sorted(engine._frames.held[0]) == sorted(experts)
            assert_consistent(engine)
        assert reads == [0, 1, 2, 3, 5]


def test_an_interrupt_while_waiting_poisons_nothing(store, weights):
    with engines.OffloadEngine(FaultyStore(store, ["slow"] * 100), [TOP_K] * LAYERS) as engine:
        compute = engine._compute
        engine._compute = lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        engine._compute.takes = compute.takes
        with pytest.raises(KeyboardInterrupt):
            step(engine, weights, 0, 0, 1)
        engine._compute = compute
        assert_consistent(engine)
        y, expected = step(engine, weights, 0, 1, 1)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_closing_twice_leaves_no_thread(store):
    before = threading.active_count()
    engine = engines.OffloadEngine(store, [TOP_K] * LAYERS)
    assert threading.active_count() > before
    engine.close()
    engine.close()
    assert threading.active_count() == before


# ------------------------------------------------------------------------------------------------------- prefetching

decode = st.integers(1, 30)


@given(tokens=decode, capacity=capacities, seed=st.integers(0, 99), policy=policies)
def test_prefetching_changes_no_bit(store, weights, tokens, capacity, seed, policy):
    with (
        engines.OffloadEngine(store, capacity) as plain,
        foreseeing(store, capacity, Guess(seed)) as ahead,
    ):
        for call in range(tokens * LAYERS):
            expected, _ = step(plain, weights, call % LAYERS, call, 1, policy)
            y, _ = step(ahead, weights, call % LAYERS, call, 1, policy)
            assert torch.equal(y, expected)
            assert torch.equal(ahead.state.slot_of, plain.state.slot_of)
            assert_consistent(ahead)
        ahead._staging.drop(ahead.counters)
        counters = ahead.counters
        assert (counters.hits, counters.misses) == (plain.counters.hits, plain.counters.misses)
        used = counters.prefetch_hits + counters.late_prefetches
        assert counters.prefetches == used + counters.wasted_prefetches + counters.cancelled_prefetches
        assert counters.pages_read == counters.misses + counters.wasted_prefetches
        assert counters.bytes_read == counters.pages_read * FORMAT.page_bytes
        assert counters.predicted_right <= counters.predicted


@given(
    calls=st.lists(st.sampled_from([1, 1, 1, 1, 4, 20]), max_size=20),
    capacity=capacities,
    seed=st.integers(0, 99),
    faults=st.lists(st.sampled_from(["none", "none", "slow", "fail"]), max_size=60),
    new_capacity=st.none() | capacities,
    lost=st.sets(st.integers(0, 20), max_size=3),
    policy=st.sampled_from([policy_of(CachePrior(0.4, 1)), DROPPING]),
)
def test_anything_that_happens_gives_the_exact_output_or_an_exception(
    store, weights, calls, capacity, seed, faults, new_capacity, lost, policy
):
    with foreseeing(FaultyStore(store, faults), capacity, Guess(seed)) as engine:
        for call, tokens in enumerate(calls):
            if call == len(calls) // 2 and new_capacity:
                engine.resize(new_capacity)
                assert_consistent(engine)
            if call in lost:  # routed, and then something else went wrong before the experts ran
                state = engine.caches(call % LAYERS)
                reference_route.route(logits_of(call, tokens), state, least_recently_used, TOP_K, policy)
                continue
            try:
                y, expected = step(engine, weights, call % LAYERS, call, tokens, policy)
            except OSError as error:
                assert str(error) == "injected"
            else:
                torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            if not lost:
                assert_consistent(engine)


def test_a_prefetch_that_failed_is_tried_again(store, weights):
    class FailsOnce(FaultyStore):
        failing: set = set()  # noqa: RUF012 (replaced)

        def read_into(self, buffer, offset):
            if offset in self.failing:
                self.failing.remove(offset)
                raise OSError("injected")
            super().read_into(buffer, offset)

    fails = FailsOnce(store, [])
    with foreseeing(fails, [TOP_K] * LAYERS, Foretells(logits_of(1, 1)[0, 0].topk(TOP_K).indices.tolist())) as engine:
        for layer, seed in ((0, 7), (1, 8)):
            step(engine, weights, layer, seed, 1)
        fails.failing = {store.offset(1, e) for e in range(EXPERTS)}
        step(engine, weights, 0, 0, 1)
        staged = engine._staging._ahead.values()
        while not all(transfer.landed for transfer in staged):
            time.sleep(1e-3)
        failed = sum(transfer.error is not None for transfer in staged)
        fails.failing = set()
        y, expected = step(engine, weights, 1, 1, 1)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        assert 0 < failed == engine.counters.failed_prefetches
        assert_consistent(engine)


@pytest.mark.parametrize("after", range(4))
def test_an_interrupted_fill_leaves_nothing_under_way(store, weights, after):
    with engines.OffloadEngine(FaultyStore(store, ["slow"] * 100), [4] * LAYERS) as engine:
        for layer in range(LAYERS):
            engine.state.slot_of[layer, :4] = engine.state.page_of[layer] = torch.arange(4)
        request, left = engine._link.request, [after]

        def interrupted(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return request(*arguments, **options)

        engine._link.request = interrupted
        with pytest.raises(KeyboardInterrupt):
            engine.fill()
        engine._link.request = request
        assert_consistent(engine)
        for seed in range(4):
            y, expected = step(engine, weights, seed % LAYERS, seed, 1)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_a_pool_that_cannot_shrink_computes_on(store, weights, monkeypatch):
    with foreseeing(store, [EXPERTS] * LAYERS, Guess(0)) as engine:
        for call in range(6):
            step(engine, weights, call % LAYERS, call, 1)

        def refuse(frames):
            raise InputError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(engine._pool, "resize", refuse)
            with pytest.raises(InputError, match="no memory"):
                engine.resize([TOP_K, TOP_K])
        assert_consistent(engine)
        for call in range(6, 16):
            y, expected = step(engine, weights, call % LAYERS, call, 1)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            assert_consistent(engine)
        engine.resize([5, 4])
        y, expected = step(engine, weights, 0, 20, 1)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_what_was_prefetched_is_not_read_again(store, weights):
    with foreseeing(store, [TOP_K] * LAYERS, Foretells(logits_of(1, 1)[0, 0].topk(TOP_K).indices.tolist())) as engine:
        step(engine, weights, 0, 7, 1)  # measures the link
        step(engine, weights, 1, 8, 1)
        step(engine, weights, 0, 0, 1)
        asked = engine.counters.prefetches
        assert 0 < asked <= TOP_K
        while not all(transfer.landed for transfer in engine._staging._ahead.values()):
            time.sleep(1e-3)
        misses = engine.counters.misses
        y, expected = step(engine, weights, 1, 1, 1)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        assert engine.counters.prefetch_hits == asked
        assert engine.counters.misses - misses >= asked
        assert engine.counters.pages_read == engine.counters.misses


@given(
    capacity=capacities,
    sizes=st.lists(capacities, min_size=1, max_size=6),
    seed=st.integers(0, 99),
    with_prefetch=st.booleans(),
)
def test_resizing_keeps_the_pages_that_stay(store, weights, capacity, sizes, seed, with_prefetch):
    with foreseeing(store, capacity, Guess(seed) if with_prefetch else None) as engine:
        call = 0
        for size in sizes:
            for _ in range(4):
                y, expected = step(engine, weights, call % LAYERS, call, 1)
                torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
                call += 1
            before = engine.state.clone()
            engine.resize(size)
            assert_consistent(engine)
            misses = engine.counters.misses
            for layer in range(LAYERS):
                stay = engine.state[layer].resident()
                assert not (stay & ~before[layer].resident()).any()
                assert int(stay.sum()) == min(int(before[layer].resident().sum()), size[layer])
                gone = before[layer].resident() & ~stay
                if gone.any():  # the least recent
                    assert before.last_use[layer, gone].max() < before.last_use[layer, stay].min()
                # What stayed computes from the page it had.
                ids = stay.nonzero().flatten()[:TOP_K].view(1, 1, -1)
                if ids.numel() == TOP_K:
                    routing = Routing.all_hits(ids)
                    routing.slots = engine.state.slot_of[layer, ids]
                    x = torch.ones(1, 32)
                    dense = {"gate_up": weights[0][layer], "down": weights[1][layer]}
                    expected = reference_experts.experts(x, ids[0], routing.weights[0], dense, FORMAT)
                    torch.testing.assert_close(engine.forward(layer, x, routing), expected, rtol=1e-4, atol=1e-5)
            assert engine.counters.misses == misses


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("level", ["all pinned", "bounded", "paced"])
def test_over_pinned_memory(store, weights, device, level, gpu):
    """The same engine on either device: from pinned memory, from a bounded level of it over the file, or paced."""
    pacing = Pacing(1e9, 1e-4) if level == "paced" else None
    with (
        PinnedLevel(store, 4) if level == "bounded" else PinnedStore(store) as pinned,
        foreseeing(pinned, [4, 5], Guess(1), device=device, pacing=pacing) as engine,
    ):
        more = 20 if gpu is None else 6  # interpreted, one takes a while
        for call, tokens in enumerate([1, 1, 1, 6, 1, 1, 1, 20, *[1] * more]):
            if call == 12:
                engine.resize([6, 3])
            layer = call % LAYERS
            x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(call))
            state = engine.caches(layer) if tokens == 1 else engine.state[layer : layer + 1]
            routing = reference_route.route(logits_of(call, tokens), state, least_recently_used, TOP_K)
            dense = {"gate_up": weights[0][layer], "down": weights[1][layer]}
            expected = reference_experts.experts(x, routing.ids[0], routing.weights[0], dense, FORMAT)
            y = engine.forward(layer, x.to(device), routing).cpu()
            torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
            assert_consistent(engine)
        engine.synchronize()
        assert engine.counters.compute_s > 0
        if level == "paced":
            assert engine.counters.stall_s > 0


def test_a_prefetcher_needs_staging(store):
    with engines.OffloadEngine(store, [TOP_K] * LAYERS) as engine:
        engine.prefetcher = None
        with pytest.raises(ValueError, match="made with staging"):
            engine.prefetcher = Guess(0)


def test_a_pool_that_cannot_grow_stays_as_it_was(store, weights, monkeypatch):
    with engines.OffloadEngine(store, [TOP_K] * LAYERS) as engine:
        step(engine, weights, 0, 0, 1)
        monkeypatch.setattr(pool, "available_memory", lambda: 0)
        with pytest.raises(InputError, match="choose a smaller capacity"):
            engine.resize([EXPERTS] * LAYERS)
        assert_consistent(engine)
        y, expected = step(engine, weights, 0, 1, 1)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("leave", ["close", "exception", "interrupt"])
def test_shutting_down_with_pages_under_way_leaves_nothing(store, weights, leave):
    before = threading.active_count()
    slow = FaultyStore(store, ["slow"] * 200)
    engine = foreseeing(slow, [TOP_K] * LAYERS, Guess(3))
    if leave == "close":
        for call in range(4):
            step(engine, weights, call % LAYERS, call, 1)
    else:
        error = KeyboardInterrupt if leave == "interrupt" else ZeroDivisionError
        with pytest.raises(error), engine:
            for call in range(4):
                step(engine, weights, call % LAYERS, call, 1)
            raise error
    engine.close()
    engine.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        step(engine, weights, 0, 1000, 1)


def test_a_soak_keeps_counters_consistent_and_memory_flat(store, weights):
    draw = random.Random(0)
    policy = policy_of(CachePrior(0.3, 1))
    logits = torch.randn(997, 1, 1, EXPERTS, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    with foreseeing(store, [TOP_K, 4], Guess(1)) as engine:
        for token in range(8_000):
            if token % 500 == 250:
                engine.resize([draw.randint(TOP_K, EXPERTS) for _ in range(LAYERS)])
            for layer in range(LAYERS):
                routing = route(
                    logits[(token * LAYERS + layer) % 997], engine.caches(layer), least_recently_used, TOP_K, policy
                )
                engine.forward(layer, x, routing)
            if token == 200:
                start = resident_bytes()
        assert_consistent(engine)
        engine._staging.drop(engine.counters)
        counters = engine.counters
        assert counters.hits + counters.misses == counters.selections == 8_000 * LAYERS * TOP_K
        assert counters.bytes_read == counters.pages_read * FORMAT.page_bytes
        assert counters.pages_read == counters.misses + counters.wasted_prefetches
        assert resident_bytes() - start < 4 << 20


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ------------------------------------------------------------------------------------------------------------- pacing


def test_pacing_holds_the_byte_rate(store, weights):
    rate = 20 * FORMAT.page_bytes  # 20 pages a second
    with engines.OffloadEngine(store, [TOP_K] * LAYERS, pacing=Pacing(rate)) as engine:
        step(engine, weights, 0, 0, 1)
        assert engine.counters.stall_s > 0.9 * engine.counters.pages_read / 20


def test_capacities_must_match_the_layers(store):
    with pytest.raises(ValueError, match="3 capacities given for the store's 2 layers"):
        engines.OffloadEngine(store, [4, 4, 4])


held_slots = st.integers(3, 6).flatmap(
    lambda slots: st.permutations(range(9)).map(lambda experts: [e if e < 7 else -1 for e in experts[:slots]])
)


def test_waves_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="cannot end with"):
        waves.plan_waves([0, 1], [2, 3], {0, 1, 2, 3})


@given(held=held_slots, data=st.data())
def test_waves_compute_each_expert_once_from_its_own_page(held, data):
    needed = data.draw(st.permutations(range(7)).flatmap(lambda p: st.integers(1, 7).map(lambda n: p[:n])))
    may_stay = sorted(set(needed) | {e for e in held if e >= 0})
    final = set(data.draw(st.permutations(may_stay))[: data.draw(st.integers(0, len(held)))])
    slots, computed = list(held), []
    for wave in waves.plan_waves(held, needed, final):
        loading = {slot for _, slot in wave.loads}
        assert len(loading) == len(wave.loads)
        for e, slot in wave.resident:
            assert slots[slot] == e
            assert slot not in loading
            computed.append(e)
        for e, slot in wave.loads:
            slots[slot] = e
            if e in needed and e not in computed:
                computed.append(e)
    assert sorted(computed) == sorted(needed)
    assert final <= set(slots)


# ---------------------------------------------------------------------------------------------- asked for a layer early


def routed(engine, layer, seed, policy=ORIGINAL):
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))
    return x, reference_route.route(logits_of(seed, 1), engine.caches(layer), least_recently_used, TOP_K, policy)


@given(tokens=st.integers(1, 10), capacity=capacities, policy=policies, ahead=st.booleans())
def test_asking_early_changes_no_bit(store, tokens, capacity, policy, ahead):
    with engines.OffloadEngine(store, capacity) as plain, foreseeing(store, capacity, Guess(0)) as early:
        early.prefetcher = Guess(0) if ahead else None
        for token in range(tokens):
            tickets = []
            for layer in range(LAYERS):  # all layers asked for before the first runs
                x, routing = routed(early, layer, token, policy)
                tickets.append((x, early.acquire(layer, routing)))
            for layer, (x, ticket) in enumerate(tickets):
                _, routing = routed(plain, layer, token, policy)
                assert torch.equal(early.forward(layer, x, ticket), plain.forward(layer, x, routing))
            assert_consistent(early)
        ours, theirs = early.counters, plain.counters
        assert (ours.hits, ours.misses, ours.drops) == (theirs.hits, theirs.misses, theirs.drops)


def test_a_ticket_that_nobody_used_leaves_its_pages(store, weights):
    with engines.OffloadEngine(store, [TOP_K] * LAYERS) as engine:
        for seed in range(6):
            _, routing = routed(engine, 0, seed)
            engine.acquire(0, routing)  # and the call ends before its experts run
        y, expected = step(engine, weights, 0, 9, 1)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        assert_consistent(engine)


def test_a_ticket_is_good_until_the_layer_is_routed_again_or_a_call_fails(store):
    with engines.OffloadEngine(FaultyStore(store, ["none"] * 2 * TOP_K + ["fail"]), [TOP_K] * LAYERS) as engine:
        x, routing = routed(engine, 0, 0)
        old = engine.acquire(0, routing)
        _, routing = routed(engine, 0, 1)
        new = engine.acquire(0, routing)
        assert old.loads and new.loads
        with pytest.raises(RuntimeError, match="good no more"):
            engine.forward(0, x, old)
        engine.forward(0, x, new)
        x, routing = routed(engine, 1, 2)
        ticket = engine.acquire(1, routing)
        with pytest.raises(OSError, match="injected"):
            engine.forward(1, x, ticket)
        with pytest.raises(RuntimeError, match="good no more"):
            engine.forward(1, x, ticket)
        assert_consistent(engine)


def test_a_ticket_of_hits_alone_is_not_good_after_a_resize_either(store):
    with engines.OffloadEngine(store, [EXPERTS] * LAYERS) as engine:
        x, routing = routed(engine, 0, 0)
        engine.forward(0, x, routing)
        x, routing = routed(engine, 0, 0)
        ticket = engine.acquire(0, routing)
        assert not ticket.loads
        engine.resize([TOP_K] * LAYERS)
        with pytest.raises(RuntimeError, match="good no more"):
            engine.forward(0, x, ticket)


def test_filling_and_resizing_wait_for_what_was_asked_for(store, weights):
    with engines.OffloadEngine(FaultyStore(store, ["slow"] * 99), [TOP_K] * LAYERS) as engine:
        for change in (engine.fill, lambda: engine.resize([EXPERTS] * LAYERS)):
            _, routing = routed(engine, 0, 3)
            engine.acquire(0, routing)
            change()
            assert_consistent(engine)
            y, expected = step(engine, weights, 0, 4, 1)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_what_an_absent_expert_costs_is_measured(store, weights):
    with engines.OffloadEngine(store, [TOP_K] * LAYERS) as plain:
        cost = plain.miss_cost()
        step(plain, weights, 0, 0, 1)
        assert_consistent(plain)
    slow = Pacing(bytes_per_second=FORMAT.page_bytes / 0.02, latency=0.0)
    with engines.OffloadEngine(store, [TOP_K] * LAYERS, pacing=slow) as paced:
        assert paced.miss_cost() > cost > 0  # 20 ms a page
