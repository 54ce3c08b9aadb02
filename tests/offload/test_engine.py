"""The engines against the reference arithmetic, under every residency, wave and fault."""

import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachemoe.kernels import reference
from cachemoe.kernels.formats import PageFormat
from cachemoe.offload import engine as engines
from cachemoe.offload import waves
from cachemoe.offload.link import Pacing
from cachemoe.offload.residency import least_recently_used
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


def step(engine, weights, layer, seed, tokens, bias=reference.CacheBias()):  # noqa: B008 (immutable)
    """Route and run one call; returns the engine's output and the reference's."""
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed))
    state = engine.state[layer : layer + 1]
    routing = reference.route(logits_of(seed, tokens), state, least_recently_used, TOP_K, bias)
    dense = {"gate_up": weights[0][layer], "down": weights[1][layer]}
    expected = reference.experts(x, routing.ids[0], routing.weights[0], dense, FORMAT)
    return engine.forward(layer, x, routing), expected


def assert_consistent(engine):
    """The page table is a bijection on the held pages, and says of every slot what the engine holds there."""
    for layer, held in enumerate(engine._held):
        assert engine.state.expert_of[layer, : len(held)].tolist() == held
        table = {e: s for e, s in enumerate(engine.state.slot_of[layer].tolist()) if s >= 0}
        assert table == {e: s for s, e in enumerate(held) if e >= 0}


calls = st.lists(st.tuples(st.integers(0, LAYERS - 1), st.sampled_from([1, 1, 1, 2, 5, 20])), min_size=1, max_size=8)
capacities = st.lists(st.integers(TOP_K, EXPERTS), min_size=LAYERS, max_size=LAYERS)


@given(calls=calls, capacity=capacities, prior=st.sampled_from([0.0, 0.4]))
def test_outputs_are_the_references(store, weights, calls, capacity, prior):
    with engines.OffloadEngine(store, capacity) as engine:
        for seed, (layer, tokens) in enumerate(calls):
            y, expected = step(engine, weights, layer, seed, tokens, reference.CacheBias(top_j=1, prior=prior))
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            assert_consistent(engine)
        counters = engine.counters
        assert counters.hits + counters.misses == counters.selections == TOP_K * sum(tokens for _, tokens in calls)
        assert counters.bytes_read == counters.pages_read * FORMAT.page_bytes
        assert counters.calls == len(calls)


@given(calls=calls, capacity=capacities)
def test_many_tokens_leave_the_experts_that_stepping_leaves(store, weights, calls, capacity):
    with engines.OffloadEngine(store, capacity) as engine:
        for seed, (layer, tokens) in enumerate(calls):
            stepped = engine.state[layer : layer + 1].clone()
            reference.route(logits_of(seed, tokens), stepped, least_recently_used, TOP_K)
            step(engine, weights, layer, seed, tokens)
            assert torch.equal(engine.state[layer].resident(), stepped.resident()[0])


@given(seeds=st.lists(st.integers(0, 99), min_size=1, max_size=12), capacity=capacities)
def test_decode_is_bit_identical_to_resident_under_eviction(store, weights, seeds, capacity):
    resident = engines.ResidentEngine(store, [EXPERTS] * LAYERS)
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
        engine.state[0].expert_of[torch.tensor([3, 0])] = torch.tensor([2, 6])
        engine.fill()
        assert sorted(engine._held[0]) == [-1, -1, 2, 6]
        assert_consistent(engine)


def test_fill_keeps_the_pages_it_has(store, weights):
    with engines.OffloadEngine(store, [4, 4]) as engine:
        reads = []
        request = engine._link.request
        engine._link.request = lambda layer, e, *rest, **paced: reads.append(e) or request(layer, e, *rest, **paced)
        for experts in ([0, 1, 2, 3], [3, 2, 1, 5]):
            engine.state.slot_of[0] = -1
            engine.state.slot_of[0, torch.tensor(experts)] = torch.arange(4)
            engine.state.expert_of[0] = torch.tensor(experts)
            engine.fill()
            assert sorted(engine._held[0]) == sorted(experts)
            assert_consistent(engine)
        assert reads == [0, 1, 2, 3, 5]


def test_an_interrupt_while_waiting_poisons_nothing(store, weights):
    with engines.OffloadEngine(FaultyStore(store, ["slow"] * 100), [TOP_K] * LAYERS) as engine:
        compute = engine._compute
        engine._compute = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
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
