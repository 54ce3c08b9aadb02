"""Levels in the engine: experts of several formats, caches that layers share, and what the idle link brings."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachemoe.kernels import reference_experts
from cachemoe.kernels.formats import PageFormat
from cachemoe.kernels.policy import Policy
from cachemoe.kernels.route import route
from cachemoe.kernels.state import Residency
from cachemoe.offload.engine import OffloadEngine
from cachemoe.offload.errors import InputError
from cachemoe.offload.residency import least_recently_used
from cachemoe.offload.store import ExpertStore, StoreLayout, write_store

LAYERS, EXPERTS, TOP_K = 2, 7, 3
FORMATS = [PageFormat("bf16", 32, 32), PageFormat("int8", 32, 32), PageFormat("int4", 32, 32, group=32)]
LRU = least_recently_used


def some_of_each(noise):
    """Levels 0 to 2, and drops."""
    return 1.0 * (noise > 0.4) + 1.0 * (noise > 0.7) - 4.0 * (noise > 0.93)


def swap_if_absent(have):
    """SWAP, but for residents."""
    return -2.0 * (have == 0)


KNOBS = torch.tensor([[0.0, 0.0, 0.0, 0.0, torch.inf, 3.0]])
LEVELS = Policy(grade=some_of_each, knobs=KNOBS)
SWAPS = Policy(grade=swap_if_absent, knobs=KNOBS, table=torch.zeros(1, EXPERTS), swaps=True, renormalises=False)


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(LAYERS, EXPERTS, 64, 32, generator=generator).bfloat16()
    down = torch.randn(LAYERS, EXPERTS, 32, 32, generator=generator).bfloat16()
    return gate_up / 4, down / 4


@pytest.fixture(scope="module")
def pages(weights):
    """Of each level every page."""
    gate_up, down = weights
    return [[f.pack(gate_up[i, e], down[i, e]) for i in range(LAYERS) for e in range(EXPERTS)] for f in FORMATS]


@pytest.fixture(scope="module")
def stores(pages, tmp_path_factory):
    folder, opened = tmp_path_factory.mktemp("stores"), []
    for page_format, each in zip(FORMATS, pages, strict=True):
        write_store(folder / page_format.kind, StoreLayout("test", LAYERS, EXPERTS, page_format), each)
        opened.append(ExpertStore(folder / page_format.kind))
    yield opened
    for store in opened:
        store.close()


@pytest.fixture(scope="module")
def dense(pages):
    """Of each level and layer the experts' matrices as numbers."""
    levels = []
    for page_format, each in zip(FORMATS, pages, strict=True):
        views = page_format.views(torch.stack(each).unflatten(0, (LAYERS, EXPERTS)))
        numbers = {name: page_format.dequantized(views, name) for name in ("gate_up", "down")}
        levels.append([{name: value[layer] for name, value in numbers.items()} for layer in range(LAYERS)])
    return levels


def step(engine, dense, layer, seed, tokens, policy=LEVELS):
    """Route and run one call; returns the output, what it has to be, and the routing."""
    generator = torch.Generator().manual_seed(seed)
    x, logits = torch.randn(tokens, 32, generator=generator), torch.randn(1, tokens, EXPERTS, generator=generator)
    state = engine.caches(layer)
    routing = route(logits, state, LRU, TOP_K, policy)
    levels = state.levels_of(routing.slots[0])
    expected = torch.zeros_like(x)
    for level, numbers in enumerate(dense):
        slots = routing.ids[0].masked_fill(levels != level, -1)
        expected += reference_experts.experts(x, slots, routing.weights[0], numbers[layer], FORMATS[level])
    return engine.forward(layer, x, routing), expected, routing


def assert_consistent(engine):
    """The page table says of every slot what the engine holds there, and every frame has one use."""
    frames = engine._frames
    for row, held in enumerate(frames.held):
        assert engine.state.page_of[row, : len(held)].tolist() == list(held)
        table = {page: s for page, s in enumerate(engine.state.slot_of[row].tolist()) if s >= 0}
        assert table == {page: s for s, page in enumerate(held) if page >= 0}
    for level, (pool, (first, end)) in enumerate(zip(frames.pools, engine.state.slots, strict=True)):
        used = [frame for of_slot in frames.of_slot for frame in of_slot[first:end]]
        if engine._staging is not None:
            staged = (*engine._staging._ahead.values(), *engine._staging._dropped)
            used += engine._staging._free[level] + [each.frame for each in staged if each.level == level]
        assert sorted(used) == list(range(len(pool.pages)))


calls = st.lists(st.tuples(st.integers(0, LAYERS - 1), st.sampled_from([1, 1, 2, 9])), min_size=1, max_size=10)
shared = pytest.mark.parametrize("capacity", [[4, 3], [7]], ids=["of each layer", "shared"])


@shared
@given(calls=calls, cheaper=st.sampled_from([(3,), (3, 4), (5, 7)]))
def test_each_place_computes_at_its_level(stores, dense, capacity, calls, cheaper):
    count = 1 + len(cheaper)
    with OffloadEngine(stores[:count], capacity, cheaper=cheaper) as engine:
        for seed, (layer, tokens) in enumerate(calls):
            y, expected, _ = step(engine, dense[:count], layer, seed, tokens)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
            assert_consistent(engine)


@shared
def test_the_bits_depend_on_no_residency(stores, dense, capacity):
    """A token's sum is the same whatever had to be fetched."""
    outputs = []
    for cheaper in ((3, 4), (7, 7)):
        with OffloadEngine(stores, capacity, cheaper=cheaper) as engine:
            for seed in range(12):
                y, _, routing = step(
                    engine, dense, seed % LAYERS, seed, 1, Policy(grade=by_id, knobs=KNOBS, table=TABLE)
                )
                outputs.append((y, engine.caches(0).levels_of(routing.slots).tolist()))
    half = len(outputs) // 2
    same = [torch.equal(a, b) for (a, levels), (b, others) in zip(outputs[:half], outputs[half:], strict=True)
            if levels == others]  # fmt: skip
    assert all(same) and len(same) > 6


TABLE = (torch.arange(EXPERTS) % 3).float()[None]


def by_id(table):
    """Each expert its own level."""
    return table


def test_bytes_and_levels_are_counted(stores, dense):
    with OffloadEngine(stores, [4, 3], cheaper=(3, 4)) as engine:
        cheap = better = drops = cheap_bytes = whole = 0
        for seed in range(60):
            state = engine.caches(seed % LAYERS).clone()
            _, _, routing = step(engine, dense, seed % LAYERS, seed, 1)
            levels, asked = engine.state.levels_of(routing.slots[0, 0]), routing.asked[0, 0] // EXPERTS
            cheap += int((levels > 0).sum())
            drops += int((levels < 0).sum())
            better += int(((levels >= 0) & (levels < asked)).sum())
            for page in routing.misses.pages[0, : routing.misses.count[0]].tolist():
                assert state.slot_of[0, page] < 0
                size = FORMATS[page // EXPERTS].page_bytes
                cheap_bytes += size * (page >= EXPERTS)
                whole += size
        c = engine.counters
    assert (c.cheap, c.drops, c.better, c.cheap_bytes, c.bytes_read) == (cheap, drops, better, cheap_bytes, whole)
    assert min(cheap, drops, better, cheap_bytes) > 0 and c.swaps == 0


def test_a_swap_runs_a_resident_in_the_place_of_an_absent_expert(stores, dense):
    with OffloadEngine(stores[0], [4, 4]) as engine:
        for seed in range(40):
            before = engine.caches(seed % LAYERS).resident()[0].clone()
            y, expected, routing = step(engine, dense[:1], seed % LAYERS, seed, 1, SWAPS)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
            asked, ids = routing.asked[0, 0], routing.ids[0, 0]
            assert ids[0] == asked[0]  # the best is never swapped
            assert before[ids[ids != asked]].all() and not before[asked[ids != asked]].any()
        assert engine.counters.swaps > 20
        assert engine.counters.misses < 60


@shared
def test_a_pool_of_levels_is_resized_between_tokens(stores, dense, capacity):
    sizes = [(capacity, (3, 4)), ([c + 2 for c in capacity], (6, 3)), ([max(c - 1, 3) for c in capacity], (3, 7))]
    with OffloadEngine(stores, capacity, cheaper=(3, 4)) as engine:
        for seed in range(30):
            y, expected, _ = step(engine, dense, seed % LAYERS, seed, 1 + seed % 4)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
            if seed % 5 == 4:
                engine.resize(*sizes[seed // 5 % 3])
                assert_consistent(engine)


def test_a_cheaper_page_that_cannot_be_read_raises_as_any(stores, dense):
    class Broken:
        """A store that cannot be read while ``broken``."""

        broken = True

        def __getattr__(self, name):
            return getattr(stores[1], name)

        def read_into(self, buffer, offset):
            if self.broken:
                raise InputError("injected")
            stores[1].read_into(buffer, offset)

    cheap, threads = Broken(), threading.active_count()
    always = Policy(grade=cheaply, knobs=KNOBS)
    with OffloadEngine([stores[0], cheap], [4, 4], cheaper=(3,)) as engine:
        with pytest.raises(InputError, match="injected"):
            step(engine, dense[:2], 0, 1, 1, always)
        assert_consistent(engine)
        cheap.broken = False
        y, expected, _ = step(engine, dense[:2], 0, 1, 1, always)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        assert_consistent(engine)
    assert threading.active_count() == threads


def cheaply(place):
    """All but the best."""
    return 1.0 * (place > 0)


@shared
@pytest.mark.parametrize("policy", [Policy(grade=cheaply, knobs=KNOBS), SWAPS], ids=["cheap", "swaps"])
def test_the_idle_link_brings_what_the_policy_would_have_had(stores, dense, capacity, policy):
    cheaper = () if policy.swaps else (3,)
    count = 1 + len(cheaper)
    with OffloadEngine(stores[:count], capacity, staging=3, cheaper=cheaper, admits=True) as engine:
        for seed in range(40):
            y, expected, _ = step(engine, dense[:count], seed % LAYERS, seed, 1, policy)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
            list(engine._link._ended(engine._staging._ahead.values()))
            assert_consistent(engine)
        c = engine.counters
        assert c.admissions > 5
        assert c.admissions * FORMATS[0].page_bytes <= c.background_bytes <= c.bytes_read - c.cheap_bytes


def test_a_page_that_idle_time_brought_has_one_slot_though_it_was_filled_in_meanwhile(stores, dense):
    with OffloadEngine(stores[:1], [4, 4], staging=3, admits=True) as engine:
        filled = 0
        for seed in range(60):
            step(engine, dense[:1], 0, seed, 1, SWAPS)
            list(engine._link._ended(engine._staging._ahead.values()))
            if staged := list(engine._staging._ahead):
                (_, expert), state = staged[0], engine.state
                state.slot_of[0, state.page_of[0, 2]] = -1  # as a residency that was saved may say
                state.page_of[0, 2], state.slot_of[0, expert] = expert, 2
                engine.fill()
                filled += 1
            step(engine, dense[:1], 0, seed, 1, SWAPS)
            assert_consistent(engine)
        assert filled > 3


@pytest.mark.parametrize(
    "how, says",
    [
        ({"stores": 2, "capacity": [4, 4], "cheaper": ()}, "2 stores given for 1 levels"),
        ({"stores": 1, "capacity": [4, 4], "cheaper": (3,)}, "1 stores given for 2 levels"),
        ({"stores": 1, "capacity": [4, 4, 4], "cheaper": ()}, "3 capacities"),
        ({"stores": 2, "capacity": [4, 4], "cheaper": (8,)}, "between 1 and the 7 experts"),
        ({"stores": 1, "capacity": [4, 4], "cheaper": (), "admits": True}, "needs staging"),
    ],
)
def test_levels_that_cannot_be_are_refused(stores, how, says):
    count = how.pop("stores")
    with pytest.raises(ValueError, match=says):
        OffloadEngine(stores[:count], **how)


def test_slots_of_each_level_come_in_order():
    state = Residency.empty(torch.tensor([5]), 9, (3, 2))
    assert state.slots == ((5, 10), (0, 3), (3, 5))
    assert state.levels_of(torch.arange(-1, 10)).tolist() == [-1, 1, 1, 1, 2, 2, 0, 0, 0, 0, 0]
