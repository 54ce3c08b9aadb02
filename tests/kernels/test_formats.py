"""Pages: what goes in comes out, within the error of rounding."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachemoe.kernels.formats import PageFormat
from cachemoe.kernels.quantize import (
    dequantize_groups,
    dequantize_int8,
    pack_bits,
    quantize_groups,
    quantize_int8,
    unpack_bits,
)

BF16_ROUNDING = 2**-8  # of the value, with room: half a unit in the last of its 8 bits is 2**-9

dimensions = st.integers(1, 40)


def random_expert(seed, hidden, inner):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2 * inner, hidden, generator=generator), torch.randn(hidden, inner, generator=generator)


def random_page(seed, page_format):
    gate_up, down = random_expert(seed, page_format.hidden, page_format.intermediate)
    gate_up = gate_up if page_format.gated else gate_up[: page_format.intermediate]
    generator = torch.Generator().manual_seed(seed)
    biases = [torch.randn(len(matrix), generator=generator) for matrix in (gate_up, down)]
    return page_format.pack(gate_up, down, *(biases if page_format.bias else []))


def bits(tensor):
    return tensor.contiguous().view(torch.int16)


@given(dimensions, dimensions, st.integers(0, 2**32 - 1))
def test_bf16_comes_back_bit_by_bit(hidden, inner, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2 * inner, hidden), (hidden, inner))
    # Any pattern of bits: infinities, NaNs, negative zeros and subnormal numbers too.
    weights = [
        torch.randint(-(2**15), 2**15, shape, generator=generator).short().view(torch.bfloat16) for shape in shapes
    ]
    page_format = PageFormat("bf16", hidden, inner)
    for view, weight in zip(page_format.views(page_format.pack(*weights)).values(), weights, strict=True):
        assert view.shape == weight.shape
        assert torch.equal(bits(view), bits(weight))


def test_bf16_lies_row_by_row_gate_first():
    gate_up, down = (weight.bfloat16() for weight in random_expert(1, 8, 5))
    page = PageFormat("bf16", 8, 5).pack(gate_up, down)
    expected = [*bits(gate_up).flatten().tolist(), *bits(down).flatten().tolist()]
    assert page.view(torch.int16)[: len(expected)].tolist() == expected
    assert not page[2 * len(expected) :].any()


@pytest.mark.parametrize(
    "page_format, weight_bytes, page_bytes",
    [
        (PageFormat("bf16", 1, 1), 6, 4096),
        (PageFormat("bf16", 32, 64), 12288, 12288),
        (PageFormat("bf16", 32, 65), 12480, 16384),
        # Half or a quarter of a byte a value, and 4 bytes for each group's scale and zero.
        (PageFormat("int4", 64, 128, 32), 12288 + 768 * 4, 16384),
        (PageFormat("int4", 64, 128, 64), 12288 + 384 * 4, 16384),
        (PageFormat("int4", 128, 128, 128), 24576 + 384 * 4, 28672),
        (PageFormat("int2", 64, 128, 32), 6144 + 768 * 4, 12288),
        (PageFormat("int2", 128, 128, 128), 12288 + 384 * 4, 16384),
        (PageFormat("fp16", 32, 64), 12288, 12288),
        # One byte a value, and a float32 scale for each of the 2I + H rows.
        (PageFormat("int8", 64, 128), 24576 + 320 * 4, 28672),
        (PageFormat("int8", 64, 128, gated=False), 16384 + 192 * 4, 20480),
        (PageFormat("bf16", 32, 64, bias=True), 12288 + 160 * 4, 16384),
    ],
)
def test_sizes(page_format, weight_bytes, page_bytes):
    assert (page_format.weight_bytes, page_format.page_bytes) == (weight_bytes, page_bytes)
    page = random_page(2, page_format)
    assert (page.dtype, page.numel()) == (torch.uint8, page_bytes)


@given(dimensions, dimensions)
def test_pages_are_the_fewest_whole_4_kib(hidden, inner):
    page_format = PageFormat("bf16", hidden, inner)
    assert page_format.page_bytes % 4096 == 0
    padding = page_format.page_bytes - 6 * hidden * inner
    assert 0 <= padding < 4096 + 16  # `down` may begin up to 15 bytes after `gate_up` ends


def test_views_share_the_pages_memory():
    page_format = PageFormat("bf16", 4, 3)
    page = page_format.pack(*random_expert(2, 4, 3))
    page.zero_()
    assert not any(view.any() for view in page_format.views(page).values())


@given(
    st.sampled_from([32, 64]),
    st.integers(1, 3),
    st.floats(1e-4, 1e4),
    st.floats(-10, 10),
    st.integers(0, 2**32 - 1),
)
def test_int4_error_is_half_a_step(group, groups, spread, centre, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(4, group * groups, generator=generator) + centre) * spread
    restored = dequantize_groups(*quantize_groups(weight, group, 4), 4).tolist()
    for row, restored_row in zip(weight.tolist(), restored, strict=True):
        for start in range(0, len(row), group):
            values = row[start : start + group]
            low, step = min(values), (max(values) - min(values)) / 15
            zero = low + 8 * step
            bound = step / 2 + BF16_ROUNDING * (abs(zero) + 16 * step)
            for value, restored_value in zip(values, restored_row[start : start + group], strict=True):
                assert abs(value - restored_value) <= bound


def rounded(value):
    """To bfloat16."""
    return torch.tensor(value).bfloat16().item()


@given(st.sampled_from([32, 64]), st.sampled_from([1.0, 3.0, 0.2]), st.floats(-2, 2), st.integers(0, 2**32 - 1))
def test_int2_cuts_off_what_leaves_the_least_error(group, power, centre, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1, group, generator=generator)
    weight = values.sign() * values.abs() ** power + centre
    restored = dequantize_groups(*quantize_groups(weight, group, 2), 2)[0].tolist()
    values = weight[0].tolist()
    low, high = min(values), max(values)

    def error(below, above):
        first, last = low + below * (high - low), high - above * (high - low)
        step = rounded((last - first) / 3)
        zero = rounded(first + 2 * step)
        numbers = [zero + (q - 2) * step for q in range(4)]
        return sum(min((value - number) ** 2 for number in numbers) for value in values)

    errors = [error(below / 16, above / 16) for below, above in product(range(5), repeat=2)]
    found = sum((value - number) ** 2 for value, number in zip(values, restored, strict=True))
    assert found == pytest.approx(min(errors), rel=1e-2)
    assert found < 1.01 * errors[0]


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.03, 1e-6])
def test_groups_of_equal_values(value, bits):
    restored = dequantize_groups(*quantize_groups(torch.full((2, 32), value), 32, bits), bits)
    assert restored.flatten().tolist() == pytest.approx([value] * 64, rel=BF16_ROUNDING, abs=1e-7)


@pytest.mark.parametrize("bits", [4, 2])
def test_as_many_even_levels_as_there_are_are_kept_exactly(bits):
    weight = (torch.arange(32) % 2**bits - 2 ** (bits - 1)).expand(3, 32) * 0.25 + 1
    q, scale, zero = quantize_groups(weight, 32, bits)
    assert q.tolist() == [[i % 2**bits for i in range(32)]] * 3
    assert (scale.unique().tolist(), zero.unique().tolist()) == ([0.25], [1.0])
    assert torch.equal(dequantize_groups(q, scale, zero, bits), weight)


@pytest.mark.parametrize("bits", [4, 2])
def test_a_row_is_rounded_by_itself(bits):
    weight = random_expert(6, 1024, 150)[0]  # of more values than are rounded together
    whole = quantize_groups(weight, 32, bits)
    for row in (0, 9, 10, 255, 256, 299):
        for part, alone in zip(whole, quantize_groups(weight[row : row + 1], 32, bits), strict=True):
            assert torch.equal(part[row], alone[0])


def test_int4_page_holds_the_scales_and_zeros_by_group():
    gate_up, down = random_expert(3, 64, 32)
    page_format = PageFormat("int4", 64, 32, 32)
    views = page_format.views(page_format.pack(gate_up, down))
    for weight, stored in ((gate_up, views["gate_up_scales"]), (down, views["down_scales"])):
        for row, values in enumerate(weight.tolist()):
            for group in range(len(values) // 32):
                part = values[32 * group : 32 * group + 32]
                step = (max(part) - min(part)) / 15
                expected = [step, min(part) + 8 * step]
                assert stored[row, group].tolist() == pytest.approx(expected, rel=2 * BF16_ROUNDING, abs=0.01)


def test_int4_packs_two_consecutive_inputs_into_a_byte_the_first_in_its_low_half():
    weight = torch.arange(32).remainder(16).sub(8.0).expand(64, 32)  # q is 0, 1, ..., 15, twice
    page_format = PageFormat("int4", 32, 32, 32)
    packed = page_format.views(page_format.pack(weight, weight[:32]))["gate_up"]
    assert packed[5].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2


def test_int2_packs_four_consecutive_inputs_into_a_byte_the_first_in_its_lowest_bits():
    weight = torch.tensor([-2.0, -1, 0, 1, 1, 0, -1, -2]).repeat(4).expand(64, 32)  # q is 0, 1, 2, 3, 3, 2, 1, 0, ...
    page_format = PageFormat("int2", 32, 32, 32)
    packed = page_format.views(page_format.pack(weight, weight[:32]))["gate_up"]
    assert packed[5].tolist() == [0b11100100, 0b00011011] * 4


@given(st.sampled_from([4, 2]), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_bits_come_back(bits, rows, together, seed):
    size = (rows, 8 // bits * together)
    q = torch.randint(0, 2**bits, size, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack_bits(pack_bits(q, bits), bits).long(), q)


@given(st.integers(1, 6), st.integers(1, 40), st.floats(1e-6, 1e6), st.integers(0, 2**32 - 1))
def test_int8_error_is_half_a_step(rows, columns, spread, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spread
    q, scale = quantize_int8(weight)
    assert q.dtype == torch.int8 and int(q.abs().max()) <= 127
    error = (dequantize_int8(q, scale) - weight).abs()
    assert bool((error <= weight.abs().amax(1, keepdim=True) / 127 * 0.5001).all())


@pytest.mark.parametrize(
    "page_format",
    [
        PageFormat("bf16", 64, 32),
        PageFormat("fp16", 33, 7, bias=True),
        PageFormat("int8", 33, 7),
        PageFormat("int4", 64, 32, 32),
        PageFormat("int4", 128, 256, 128, gated=False, activation="relu"),
        PageFormat("int2", 32, 64, 32),
    ],
)
def test_a_page_taken_apart_is_near_what_it_was_made_of(page_format):
    gate_up, down = random_expert(5, page_format.hidden, page_format.intermediate)
    gate_up = gate_up if page_format.gated else gate_up[: page_format.intermediate]
    biases = [torch.randn(len(gate_up)), torch.randn(len(down))] if page_format.bias else []
    views = page_format.views(page_format.pack(gate_up, down, *biases))
    steps = {"bf16": 2**-8, "fp16": 2**-11, "int8": 1 / 254, "int4": 1 / 15, "int2": 1 / 2}
    for name, weight in (("gate_up", gate_up), ("down", down)):
        error = (page_format.dequantized(views, name) - weight).abs().max()
        assert error <= weight.abs().max() * steps[page_format.kind] * 1.1
    for name, bias in zip(("gate_up_bias", "down_bias"), biases, strict=False):
        assert torch.equal(views[name], bias)


def test_views_of_many_pages_are_the_pages_views():
    page_format = PageFormat("int4", 64, 32, 32, bias=True)
    pages = torch.stack([random_page(seed, page_format) for seed in range(6)]).view(2, 3, -1)
    for name, views in page_format.views(pages).items():
        for i in range(2):
            for j in range(3):
                assert torch.equal(views[i, j], page_format.views(pages[i, j])[name])


@pytest.mark.parametrize("page_format", [PageFormat("int4", 64, 32, 32, bias=True), PageFormat("int8", 3, 5)])
def test_a_format_survives_being_text(page_format):
    assert PageFormat.decode(page_format.encoded) == page_format


def test_every_part_can_be_loaded_16_bytes_at_a_time():
    for page_format in (PageFormat("bf16", 3, 5, bias=True), PageFormat("int8", 7, 3, bias=True)):
        assert all(first % 16 == 0 for _, first, *_ in page_format.parts)


@pytest.mark.parametrize("kind, group", [("bf16", 0), ("int8", 0), ("int4", 32), ("int2", 32)])
def test_strides_do_not_matter(kind, group):
    page_format = PageFormat(kind, 64, 32, group)
    gate_up, down = random_expert(4, 64, 32)
    transposed = [weight.t().contiguous().t() for weight in (gate_up, down)]
    assert torch.equal(page_format.pack(*transposed), page_format.pack(gate_up, down))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("int3", 64, 64, 32), "unknown page format 'int3'"),
        (("bf16", 0, 64), "positive dimensions"),
        (("bf16", 64, -1), "positive dimensions"),
        (("bf16", 64, 64, 32), "no groups"),
        (("int4", 64, 64), "groups of"),
        (("int4", 64, 64, 16), "groups of"),
        (("int4", 64, 64, 128), "divisible"),
        (("int4", 48, 64, 32), "divisible"),
        (("int4", 64, 48, 32), "divisible"),
        (("int8", 64, 64, 64), "no groups"),
        (("bf16", 64, 64, 0, True, "tanh"), "unknown activation 'tanh'"),
        (("bf16", 64, 64, 0, False, "clamped-swiglu"), "without a gate"),
        (("bf16", 64, 64, 0, False, "silu", False, True), "without a gate"),
        (("int4", 96, 64, 64), "divisible"),
        (("int4", 64, 96, 64), "divisible"),
        (("int2", 64, 64, 16), "int2 pages have groups of"),
        (("int2", 64, 96, 64), "int2 pages need H and I divisible"),
    ],
)
def test_a_format_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PageFormat(*arguments)


@pytest.mark.parametrize("gate_up, down", [((10, 6), (5, 6)), ((5, 6), (6, 5)), ((6, 10), (6, 5)), ((60,), (6, 5))])
def test_weights_of_another_shape_are_refused(gate_up, down):
    with pytest.raises(ValueError, match=r"expected \(\(10, 6\), \(6, 5\)\)"):
        PageFormat("bf16", 6, 5).pack(torch.zeros(gate_up), torch.zeros(down))


@pytest.mark.parametrize("bias, given, message", [(True, 0, "missing"), (False, 2, "were given"), (True, 1, "missing")])
def test_biases_are_given_where_the_format_has_them(bias, given, message):
    with pytest.raises(ValueError, match=message):
        PageFormat("bf16", 6, 5, bias=bias).pack(torch.zeros(10, 6), torch.zeros(6, 5), *[torch.zeros(10)] * given)
