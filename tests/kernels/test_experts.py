"""The experts kernels against their reference: in Triton's interpreter on the CPU, and on a GPU where there is one."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachemoe.kernels import quantized_cpu, reference_experts
from cachemoe.kernels.experts import experts, experts_read_through
from cachemoe.kernels.experts_cpu import side_by_side
from cachemoe.kernels.experts_decode import plan_decode
from cachemoe.kernels.experts_prefill import group_by_slot, plan_prefill
from cachemoe.kernels.formats import GROUPED, PageFormat

pytestmark = pytest.mark.kernel


def device():
    """Asked in each test: a GPU may be imitated for some."""
    return "cuda" if torch.cuda.is_available() else "cpu"


# The interpreter computes bfloat16 arithmetic wrongly: there, bfloat16 is only ever loaded.
FLOATS = [torch.float32, torch.float16] + ([torch.bfloat16] if device() == "cuda" else [])
# Of the largest output, for one product of rounded inputs and one rounding of the output.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}

FORMATS = [
    PageFormat("bf16", 48, 33),
    PageFormat("bf16", 64, 40, gated=False, activation="relu"),
    PageFormat("fp16", 17, 5, activation="gelu", bias=True),
    PageFormat("fp16", 33, 64, activation="clamped-swiglu", bias=True, interleaved=True),
    PageFormat("int8", 47, 33),
    PageFormat("int8", 64, 32, activation="clamped-swiglu", bias=True, interleaved=True),
    PageFormat("int4", 64, 32, 32, bias=True),
    PageFormat("int4", 192, 64, 64, activation="gelu", interleaved=True),
    PageFormat("int4", 128, 128, 128, gated=False),
    PageFormat("int8", 80, 48),
    PageFormat("int2", 64, 32, 32, bias=True),
    PageFormat("int2", 320, 64, 64, activation="gelu", interleaved=True),
    PageFormat("int2", 256, 128, 128, gated=False),
]


def name_of(page_format):
    fields = (page_format.kind, page_format.group or "", page_format.activation, page_format.gated or "ungated")
    return "-".join(str(field) for field in fields if field not in ("", True))


each_format = pytest.mark.parametrize("page_format", FORMATS, ids=name_of)
some_formats = pytest.mark.parametrize("page_format", [FORMATS[0], FORMATS[5], FORMATS[6], FORMATS[10]], ids=name_of)
INTERPRETED = pytest.mark.gpu_only("interpreted, the same as the tests of the kernels")
each_float = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_path = pytest.mark.parametrize("run", ["decode", "prefill"], indirect=True)


class Case:
    """A pool of random pages, of which ``unused`` slots hold NaN, and tokens that use the others."""

    def __init__(self, page_format, tokens, top_k, slots, dtype, unused=1, seed=0):
        torch.manual_seed(seed)
        self.page_format = page_format
        rows = page_format.parts[0][-1][0]
        hidden, inner = page_format.hidden, page_format.intermediate
        self.pool = torch.full((slots + unused, page_format.page_bytes), 0xFF, dtype=torch.uint8)
        self.used = torch.randperm(slots + unused)[:slots]
        for slot in self.used.tolist():
            biases = [torch.randn(rows), torch.randn(hidden)] if page_format.bias else []
            matrices = torch.randn(rows, hidden) * hidden**-0.5, torch.randn(hidden, inner) * inner**-0.5
            self.pool[slot] = page_format.pack(*matrices, *biases)
        self.pool = self.pool.to(device())
        self.x = torch.randn(tokens, hidden).to(device(), dtype)
        chosen = [self.used[torch.randperm(slots)[:top_k]] for _ in range(tokens)]
        self.slots = torch.stack(chosen).to(device())
        self.gates = torch.rand(tokens, top_k).to(device())

    @property
    def weights(self):
        return self.page_format.views(self.pool)

    def expected(self):
        weights = self.weights
        dense = {
            name: weights[name].float() if name.endswith("bias") else self.page_format.dequantized(weights, name)
            for name in weights
            if not name.endswith("scales")
        }
        return reference_experts.experts(self.x, self.slots, self.gates, dense, self.page_format)

    def arguments(self):
        return self.x, self.slots, self.gates, self.weights, self.page_format


def poisoned(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype, device=device())


def launch(path, case, pending=None, results=None, finish=True, bounds=(), **source):
    """Run the kernels themselves, whatever the device; scratch and outputs start as NaN."""
    out = poisoned(*case.x.shape, dtype=case.x.dtype)
    h = poisoned(case.slots.numel(), case.page_format.intermediate, dtype=case.x.dtype)
    if path == "decode":
        launches = plan_decode(*case.arguments(), out, h, pending, results, finish, **source)
    else:
        results = poisoned(*case.slots.shape, case.x.shape[1], dtype=torch.float32) if results is None else results
        launches = plan_prefill(*case.arguments(), out, h, results, pending, finish, *bounds)
    for each in launches:
        each.run()
    return out


@pytest.fixture
def run(request):
    return partial(launch, request.param)


def assert_near(y, expected):
    """The largest error, against the largest output, and the root mean square of both."""
    assert y.dtype == expected.dtype
    error, tolerance = (y.float() - expected.float()).abs(), TOLERANCE[y.dtype]
    assert float(error.max()) <= tolerance * float(expected.float().abs().max())  # and so no NaN
    assert float(error.square().mean()) <= tolerance**2 / 4 * float(expected.float().square().mean())


# ------------------------------------------------------------------------------------------------ every combination


@each_path
@each_float
@each_format
def test_equal_to_the_reference(run, page_format, dtype):
    case = Case(page_format, tokens=2, top_k=3, slots=4, dtype=dtype)
    assert_near(run(case), case.expected())


@each_path
@pytest.mark.parametrize(
    "tokens, top_k, slots",
    [
        (1, 1, 1),
        (1, 16, 16),  # K = E
        (1, 6, 13),  # K is no power of two
        (2, 1, 512),
        (5, 2, 37),
    ],
)
@pytest.mark.parametrize("page_format", [FORMATS[0], FORMATS[4], FORMATS[6], FORMATS[9], FORMATS[10]], ids=name_of)
def test_awkward_shapes(run, page_format, tokens, top_k, slots):
    case = Case(page_format, tokens, top_k, slots, torch.float32, unused=3)
    assert_near(run(case), case.expected())


@each_format
def test_more_pairs_of_a_slot_than_a_tile_has(page_format):
    case = Case(page_format, 19, 1, 1, torch.float32, unused=3)
    assert_near(launch("prefill", case), case.expected())


@each_path
@pytest.mark.parametrize("hidden, inner", [(1, 1), (3, 2), (7, 129), (257, 31), (1024, 3)])
def test_any_width(run, hidden, inner):
    case = Case(PageFormat("bf16", hidden, inner), 2, 2, 3, torch.float32)
    assert_near(run(case), case.expected())


@each_path
@pytest.mark.parametrize("exponent", [-22, 22])
@pytest.mark.parametrize(
    "page_format", [FORMATS[0], FORMATS[4], FORMATS[6], FORMATS[8], FORMATS[9], FORMATS[12]], ids=name_of
)
def test_tokens_of_any_size(run, page_format, exponent):
    page_format = replace(page_format, activation="relu", bias=False)  # of which both products grow with the token
    case = Case(page_format, tokens=2, top_k=2, slots=3, dtype=torch.float32)
    case.x = case.x * 2.0**exponent
    assert_near(run(case), case.expected())


@pytest.mark.parametrize("largest", [1, 30, 127])
@pytest.mark.parametrize("x", ["normal", "positive", "of many sizes"])
def test_int8_is_near_the_exact_sum(x, largest):
    torch.manual_seed(0)
    page_format = PageFormat("int8", 2048, 16, gated=False, activation="relu")
    pool = torch.zeros(1, page_format.page_bytes, dtype=torch.uint8)
    weights = page_format.views(pool)
    weights["gate_up"][0] = torch.randint(-largest, largest + 1, (16, 2048))
    weights["gate_up_scales"][0] = 1.0
    weights = page_format.views(pool.to(device()))
    normal = torch.randn(1, 2048)
    x = {"normal": normal, "positive": normal.abs(), "of many sizes": normal * torch.randn(1, 2048).mul(2).exp()}[x]
    h, slots, gates = poisoned(1, 16, dtype=torch.float32), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    x, slots, gates = x.to(device()), slots.to(device()), gates.to(device())
    plan_decode(x, slots, gates, weights, page_format, torch.empty_like(x), h)[0].run()
    exact = (weights["gate_up"][0].double() @ x[0].double()).relu()
    assert (h[0] - exact).abs().max() < 2.0**-15 * x.abs().sum()


@each_path
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("page_format", [FORMATS[0], FORMATS[4], FORMATS[6], FORMATS[9], FORMATS[10]], ids=name_of)
def test_a_token_that_is_not_finite_spoils_its_own_row_alone(run, page_format, value):
    case = Case(page_format, tokens=3, top_k=2, slots=3, dtype=torch.float32)
    whole = run(case)
    case.x[1, 5] = value
    y = run(case)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2]], whole[[0, 2]])


# ----------------------------------------------------------------------------------------------------- the page table


@each_path
@some_formats
def test_the_slot_a_page_is_in_does_not_change_a_bit(run, page_format):
    case = Case(page_format, tokens=3, top_k=2, slots=5, dtype=torch.float32)
    before = run(case)
    moved = torch.randperm(case.pool.shape[0]).to(device())
    case.pool = case.pool[moved.argsort()]
    case.slots = moved[case.slots]
    assert torch.equal(run(case), before)


@each_path
def test_offsets_beyond_32_bits(run):
    page_format = PageFormat("int8", 32, 16)
    case = Case(page_format, tokens=2, top_k=2, slots=4, dtype=torch.float32, unused=0)
    near, stride = case.expected(), 2**30
    memory = torch.empty(3 * stride + page_format.page_bytes, dtype=torch.uint8, device=device())  # hardly touched
    far = memory.as_strided(case.pool.shape, (stride, 1))
    far.copy_(case.pool)
    case.pool = far
    assert_near(run(case), near)


# ------------------------------------------------------------------------------------------- some now, the rest later


@each_path
@some_formats
def test_hits_first_and_misses_later_give_the_same_bits(run, page_format):
    case = Case(page_format, tokens=2, top_k=3, slots=6, dtype=torch.float32)
    at_once = run(case)
    missing = case.used[::2].to(device())
    pending = torch.isin(case.slots, missing)
    assert pending.any() and not pending.all()
    pages, results = case.pool[missing], poisoned(2, 3, page_format.hidden, dtype=torch.float32)
    case.pool[missing] = 0xFF
    assert run(case, ~pending, results, finish=False).isnan().all()
    case.pool[missing] = pages
    case.pool[case.used[1::2]] = 0xFF  # what was computed is not computed again
    assert torch.equal(run(case, pending, results, finish=True), at_once)


def test_what_a_caller_knows_of_the_pairs_changes_no_bit_and_spares_programs():
    """A pool has the slots of many layers: without bounds a prompt would be cut for all of them."""
    case = Case(FORMATS[0], tokens=40, top_k=2, slots=5, dtype=torch.float32, unused=60)
    at_once = launch("prefill", case, bounds=(5,))
    pending = case.slots == case.used[0].item()
    results = poisoned(40, 2, 48, dtype=torch.float32)
    for part, count in ((~pending, 4), (pending, 1)):
        bounds = 5, (int(part.sum()), count)
        launch("prefill", case, part, results, False, bounds)
    assert torch.equal(launch("prefill", case, torch.zeros_like(pending), results, True, (5, (0, 0))), at_once)

    def programs(*bounds):
        h, pairs = case.x.new_empty(80, 32), torch.empty(40, 2, 48)
        return [each.grid[0] for each in plan_prefill(*case.arguments(), case.x, h, pairs, pending, False, *bounds)]

    assert programs(5, (int(pending.sum()), 1)) < programs(5) < programs()


@each_path
@pytest.mark.parametrize("value", [True, False])
def test_all_and_none_are_some(run, value):
    case = Case(FORMATS[0], tokens=3, top_k=2, slots=4, dtype=torch.float32)
    pending, results = torch.full_like(case.slots, value, dtype=torch.bool), torch.rand(3, 2, 48, device=device())
    y = run(case, pending, results.clone())
    expected = run(case) if value else torch.einsum("tk,tkh->th", case.gates, results)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@each_path
def test_the_same_call_gives_the_same_bits(run):
    case = Case(FORMATS[6], tokens=2, top_k=2, slots=5, dtype=torch.float16)
    assert torch.equal(run(case), run(case))


# --------------------------------------------------------------------------------------------------- dropped experts


def with_drops(page_format, tokens, top_k, slots):
    """A case in which some experts of each token are dropped, whose weights must not matter."""
    case = Case(page_format, tokens, top_k, slots, torch.float32)
    generator = torch.Generator().manual_seed(1)
    dropped = torch.rand(tokens, top_k, generator=generator) < 0.5
    dropped[:, 0] &= dropped[:, 1:].any(1)  # not always the last places
    dropped[dropped.all(1), 1] = False
    dropped = dropped.to(device())
    case.slots[dropped], case.gates[dropped] = -1, torch.nan
    return case, dropped


@each_path
@each_format
def test_a_dropped_expert_has_no_part(run, page_format):
    case, dropped = with_drops(page_format, 2, 4, 6)
    assert dropped.any()
    y = run(case)
    case.gates[dropped] = 0.0
    assert_near(y, case.expected())


@each_path
@some_formats
def test_hits_first_and_misses_later_where_some_are_dropped(run, page_format):
    case, _ = with_drops(page_format, 3, 4, 6)
    at_once, results = run(case), poisoned(3, 4, page_format.hidden, dtype=torch.float32)
    pending = torch.isin(case.slots, case.used[::2].to(device()))
    assert pending.any()
    run(case, ~pending, results, finish=False)
    assert torch.equal(run(case, pending, results, finish=True), at_once)


@some_formats
def test_the_cpu_drops_too(page_format):
    for tokens in (1, 4):
        case, dropped = with_drops(page_format, tokens, 4, 6)
        x, slots, gates, weights = (each.cpu() if torch.is_tensor(each) else each for each in case.arguments()[:4])
        weights = page_format.views(case.pool.cpu())
        y = experts(x, slots, gates, weights, page_format)
        assert_near(y, experts(x, slots, gates.nan_to_num(0.0), weights, page_format))
        pending = torch.isin(slots, case.used[::2]) | dropped.cpu()
        partial = torch.full((tokens, 4, page_format.hidden), torch.nan)
        experts(x, slots, gates, weights, page_format, None, ~pending, partial, finish=False)
        assert torch.equal(experts(x, slots, gates, weights, page_format, None, pending, partial), y)
        case.gates[dropped] = 0.0
        assert_near(y, case.expected().cpu())


@some_formats
def test_reading_through_passes_dropped_experts_by(page_format):
    case, dropped = with_drops(page_format, 1, 4, 6)
    expected = launch("decode", case)
    missing = (~dropped[0]).nonzero()[0].item()
    slot, pages = int(case.slots[0, missing]), torch.full((1, 4), -1, device=device())
    store, before = case.pool.clone(), case.pool.clone()
    pages[0, missing], case.pool[slot] = slot, 0xFF
    y = experts_read_through(*case.arguments()[:3], case.pool, store, pages, page_format)
    assert_near(y, expected)
    filled = case.weights
    for name, view in page_format.views(before).items():
        assert torch.equal(filled[name][slot].view(torch.uint8), view[slot].view(torch.uint8)), name


# ---------------------------------------------------------------------------------------------------- reading through


@each_format
@pytest.mark.parametrize("missing", [[1, 3], [0, 1, 2]])
def test_reading_through_computes_and_fills_the_slots(page_format, missing):
    case = Case(page_format, tokens=1, top_k=4, slots=6, dtype=torch.float32)
    expected, full = launch("decode", case), case.pool.clone()
    store = torch.full((9, page_format.page_bytes), 0xFF, dtype=torch.uint8, device=device())
    pages = torch.full((1, 4), -1, device=device())
    for page, k in zip((7, 2, 5, 0), missing, strict=False):
        slot = int(case.slots[0, k])
        pages[0, k], store[page], case.pool[slot] = page, full[slot], 0xFF
    source = page_format.views(store)
    assert torch.equal(launch("decode", case, source=pages, source_weights=source), expected)
    views = case.weights
    for slot in case.slots[0].tolist():
        for name, view in page_format.views(full).items():
            assert torch.equal(views[name][slot].view(torch.uint8), view[slot].view(torch.uint8)), name


# --------------------------------------------------------------------------------------------------- grouping by slot


@given(st.data())
def test_tiles_hold_each_pair_once_with_its_slot(data):
    tokens, top_k, count = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))
    block_m = data.draw(st.sampled_from([1, 4, 16]))
    slots = torch.tensor(
        data.draw(st.lists(st.integers(-1, count - 1), min_size=tokens * top_k, max_size=tokens * top_k))
    )
    pending = data.draw(st.none() | st.lists(st.booleans(), min_size=tokens * top_k, max_size=tokens * top_k))
    mask = None if pending is None else torch.tensor(pending).view(tokens, top_k)
    taking = [pair for pair in range(tokens * top_k) if slots[pair] >= 0 and (pending is None or pending[pair])]
    most = len(taking), len(set(slots[taking].tolist()))
    if data.draw(st.booleans()):  # or what can be said without looking
        most = slots.numel(), count
    order, tile_slot, tile_first, slot_end = group_by_slot(slots.view(tokens, top_k), mask, count, block_m, most)
    found = []
    for slot, first in zip(tile_slot.tolist(), tile_first.tolist(), strict=True):
        if slot < count:
            pairs = order[first : min(first + block_m, int(slot_end[slot]))].tolist()
            assert pairs and all(slots[pair] == slot for pair in pairs)
            found += pairs
    assert sorted(found) == taking
    assert tile_slot.numel() <= most[0] // block_m + most[1]


# ------------------------------------------------------------------------------------------------- the public function


@pytest.mark.parametrize("tokens", [1, 4, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_format", FORMATS, ids=name_of)
def test_on_the_cpu(page_format, dtype, tokens):
    case = Case(page_format, tokens, top_k=2, slots=3, dtype=dtype)
    x, slots, gates, pool = (each.cpu() for each in (case.x, case.slots, case.gates, case.pool))
    assert_near(experts(x, slots, gates, page_format.views(pool), page_format), case.expected().cpu())


@pytest.mark.parametrize("page_format", [FORMATS[4], FORMATS[7], FORMATS[11]], ids=name_of)
def test_on_a_cpu_the_bits_do_not_depend_on_the_threads_or_on_the_other_experts(page_format):
    case = Case(page_format, tokens=1, top_k=5, slots=6, dtype=torch.bfloat16)
    x, slots, weights = case.x.cpu(), case.slots[0].cpu(), page_format.views(case.pool.cpu())
    together, threads = side_by_side(x, weights, slots, page_format), torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        alone = [side_by_side(x, weights, slot[None], page_format) for slot in slots]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_format", [FORMATS[4], FORMATS[6], FORMATS[7], *FORMATS[10:]], ids=name_of)
def test_on_a_cpu_a_page_taken_apart_is_the_formats_own_numbers(page_format, dtype):
    case = Case(page_format, tokens=1, top_k=1, slots=1, dtype=dtype)
    weights = page_format.views(case.pool.cpu()[int(case.used[0])])
    for name in ("gate_up", "down"):
        parts = weights[name], weights[f"{name}_scales"]
        numbers = quantized_cpu.unpack(*parts, page_format.bits, page_format.group, dtype)
        assert torch.equal(numbers, page_format.dequantized(weights, name).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x", ["normal", "positive", "of many sizes"])
@pytest.mark.parametrize("columns", [2048, 2880, 32])
@pytest.mark.parametrize("kind", GROUPED)
def test_on_a_cpu_a_row_is_near_the_exact_sum(kind, columns, x, dtype):
    torch.manual_seed(0)
    page_format = PageFormat(kind, columns, 32, 32, gated=False)
    weights = page_format.views(torch.randint(0, 256, (1, page_format.page_bytes), dtype=torch.uint8))
    scales = weights["gate_up_scales"]
    scales[..., 0], scales[..., 1] = 1.0, 0.0
    normal = torch.randn(1, 1, columns)
    x = {"normal": normal, "positive": normal.abs(), "of many sizes": normal * torch.randn(columns).mul(2).exp()}[x]
    x = x.to(dtype)
    y = quantized_cpu.linear(x[0], weights["gate_up"][0], scales[0], page_format.bits, page_format.group)[None]
    exact = page_format.dequantized(weights, "gate_up")[0].double() @ x[0, 0].double()
    assert (y[0, 0] - exact).abs().max() < 2.0**-17 * x.double().abs().sum()


@pytest.mark.parametrize("page_format", [FORMATS[5], FORMATS[6], FORMATS[11]], ids=name_of)
def test_on_a_cpu_without_a_c_compiler(page_format, monkeypatch):
    def refuse(source):
        raise OSError("there is no C compiler")

    monkeypatch.setattr(quantized_cpu, "library", lambda: refuse(None))
    quantized_cpu.has_c.cache_clear()
    quantized_cpu.warn_without_c.cache_clear()
    case = Case(page_format, tokens=1, top_k=2, slots=3, dtype=torch.float32)
    x, slots, gates, pool = (each.cpu() for each in (case.x, case.slots, case.gates, case.pool))
    try:
        with pytest.warns(RuntimeWarning, match="slow: there is no C compiler"):
            y = experts(x, slots, gates, page_format.views(pool), page_format)
    finally:
        quantized_cpu.has_c.cache_clear()
    assert_near(y, case.expected().cpu())


@pytest.mark.parametrize("finish", [True, False])
def test_on_the_cpu_pending_pairs_are_computed_and_others_taken_from_the_partial_results(finish):
    case = Case(FORMATS[0], tokens=4, top_k=2, slots=3, dtype=torch.float32)
    arguments = [each.cpu() for each in (case.x, case.slots, case.gates)]
    weights = FORMATS[0].views(case.pool.cpu())
    at_once = experts(*arguments, weights, FORMATS[0])
    pending = arguments[1] == case.used[0]
    results, out = torch.full((4, 2, 48), float("nan")), torch.full((4, 48), 7.0)
    experts(*arguments, weights, FORMATS[0], out, ~pending, results, finish=False)
    assert (out == 7).all()
    experts(*arguments, weights, FORMATS[0], out, pending, results, finish)
    assert torch.equal(out, at_once) if finish else (out == 7).all()


def test_reading_through_on_the_cpu():
    case = Case(FORMATS[0], tokens=1, top_k=2, slots=3, dtype=torch.float32)
    x, slots, gates, pool = (each.cpu() for each in (case.x, case.slots, case.gates, case.pool))
    expected, store = experts(x, slots, gates, FORMATS[0].views(pool), FORMATS[0]), pool.flip(0).contiguous()
    full, pages = pool.clone(), torch.tensor([[-1, len(pool) - 1 - int(slots[0, 1])]])
    pool[slots[0, 1]] = 0xFF
    assert torch.equal(experts_read_through(x, slots, gates, pool, store, pages, FORMATS[0]), expected)
    assert torch.equal(pool, full)


def test_torch_compile_takes_the_operators_whole():
    case = Case(FORMATS[0], tokens=1, top_k=2, slots=3, dtype=torch.float32)
    pages = torch.full((1, 2), -1, device=device())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, slots, gates, pool):
        y = experts(x * 2, slots, gates, FORMATS[0].views(pool), FORMATS[0])
        return y + experts_read_through(x, slots, gates, pool, pool, pages, FORMATS[0])

    once, twice = (experts(x, case.slots, case.gates, case.weights, FORMATS[0]) for x in (case.x, case.x * 2))
    y = compiled(case.x, case.slots, case.gates, case.pool)
    torch.testing.assert_close(y, once + twice, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 47), "out": torch.zeros(2, 47)}, "48 wide"),
        ({"x": torch.zeros(48, 2).t()}, "x must be contiguous"),
        ({"x": torch.zeros(48)}, r"x must be \[T, H\]"),
        ({"slots": torch.zeros(2, 2, dtype=torch.int64).t()}, "slots must be contiguous"),
        ({"out": torch.zeros(48, 2).t()}, "out must be contiguous"),
        ({"slots": torch.zeros(2, 2, dtype=torch.int32)}, "slots is torch.int32"),
        ({"slots": torch.zeros(3, 2, dtype=torch.int64)}, "slots is"),
        ({"gates": torch.zeros(2, 2, dtype=torch.float16)}, "gates is torch.float16"),
        ({"out": torch.zeros(2, 48, dtype=torch.float16)}, "out is torch.float16"),
        ({"pending": torch.ones(2, 2, dtype=torch.bool)}, "needs `partial`"),
        ({"finish": False}, "needs `partial`"),
        ({"partial": torch.zeros(2, 2, 47)}, "partial is"),
        ({"weights": FORMATS[1].views(torch.zeros(3, FORMATS[1].page_bytes, dtype=torch.uint8))}, "gate_up is"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    case = Case(FORMATS[0], tokens=2, top_k=2, slots=3, dtype=torch.float32)
    arguments = dict(zip(("x", "slots", "gates", "weights", "page_format"), case.arguments(), strict=True))
    arguments = {n: a.cpu() if isinstance(a, torch.Tensor) else a for n, a in arguments.items()}
    arguments["weights"] = {n: w.cpu() for n, w in arguments["weights"].items()}
    with pytest.raises(ValueError, match=message):
        experts(**(arguments | change))


def test_transposed_weights_are_refused():
    case = Case(FORMATS[0], tokens=1, top_k=2, slots=3, dtype=torch.float32)
    weights = {name: tensor.mT.contiguous().mT for name, tensor in case.weights.items()}
    with pytest.raises(ValueError, match="gate_up must be contiguous"):
        experts(case.x, case.slots, case.gates, weights, case.page_format)


def test_weights_go_by_name():
    page_format = PageFormat("bf16", 32, 32, gated=False)  # both matrices have one shape
    case = Case(page_format, tokens=2, top_k=2, slots=3, dtype=torch.float32)
    backwards = dict(reversed(case.weights.items())) | {"another": torch.zeros(1)}
    y = experts(case.x, case.slots, case.gates, backwards, page_format)
    assert_near(y, case.expected())


@pytest.mark.parametrize(
    "change", [{"store": torch.zeros(3, 64, dtype=torch.uint8)}, {"pages": torch.full((1, 2), -1, dtype=torch.int32)}]
)
def test_reading_through_refuses_another_store(change):
    case = Case(FORMATS[0], tokens=1, top_k=2, slots=3, dtype=torch.float32)
    arguments = {"store": case.pool, "pages": torch.full((1, 2), -1)} | change
    with pytest.raises(ValueError, match=r"one token|cannot be read into"):
        experts_read_through(case.x, case.slots, case.gates, case.pool, page_format=FORMATS[0], **arguments)


def test_threads_leave_torch_as_it_was():
    case = Case(PageFormat("bf16", 64, 64), tokens=1, top_k=2, slots=3, dtype=torch.float32)
    x, slots, gates = (each.cpu() for each in (case.x.bfloat16(), case.slots, case.gates))
    weights = case.page_format.views(case.pool.cpu())
    before = torch.backends.mkldnn.enabled
    with ThreadPoolExecutor(4) as threads:
        outputs = list(threads.map(lambda _: experts(x, slots, gates, weights, case.page_format), range(200)))
    assert torch.backends.mkldnn.enabled == before
    assert all(torch.equal(y, outputs[0]) for y in outputs)


def test_reading_through_is_for_one_token():
    case = Case(FORMATS[0], tokens=2, top_k=2, slots=3, dtype=torch.float32)
    with pytest.raises(ValueError, match="one token"):
        experts_read_through(case.x, case.slots, case.gates, case.pool, case.pool, case.slots, FORMATS[0])


# -------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "page_format",
    [FORMATS[5], *(pytest.param(each, marks=INTERPRETED) for each in FORMATS if each is not FORMATS[5])],
    ids=name_of,
)
@each_float
@pytest.mark.parametrize("tokens", [1, 200])
def test_the_public_function_on_a_gpu(page_format, dtype, tokens):
    case = Case(page_format, tokens, top_k=3, slots=6, dtype=dtype)
    assert_near(experts(*case.arguments()), case.expected())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 200])
def test_a_captured_graph_follows_the_page_table(tokens):
    case = Case(FORMATS[6], tokens, top_k=3, slots=6, dtype=torch.bfloat16)
    out = torch.empty_like(case.x)
    experts(*case.arguments(), out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        experts(*case.arguments(), out)
    for seed in range(3):
        other = Case(FORMATS[6], tokens, top_k=3, slots=6, dtype=torch.bfloat16, seed=seed)
        for name in ("pool", "x", "slots", "gates"):
            getattr(case, name).copy_(getattr(other, name))
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, experts(*other.arguments()))


@pytest.mark.gpu
def test_reading_through_from_pinned_memory():
    case = Case(PageFormat("bf16", 512, 256), tokens=1, top_k=4, slots=6, dtype=torch.bfloat16)
    expected, full = experts(*case.arguments()), case.pool.clone()
    store = case.pool.cpu().pin_memory()
    pages = torch.where(torch.arange(4, device=device()) < 2, case.slots, -1)
    case.pool[case.slots[0, :2]] = 0xFF
    y = experts_read_through(case.x, case.slots, case.gates, case.pool, store, pages, case.page_format)
    assert torch.equal(y, expected) and torch.equal(case.pool, full)
