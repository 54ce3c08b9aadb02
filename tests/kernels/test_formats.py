"""Pages: what goes in comes out, within int4's error."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachemoe.kernels.formats import PageFormat, dequantize_int4, int4_packing, quantize_int4

BF16_ROUNDING = 2**-8  # of the value, with room: half a unit in the last of its 8 bits is 2**-9

dimensions = st.integers(1, 40)


def random_expert(seed, hidden, inner):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2 * inner, hidden, generator=generator), torch.randn(hidden, inner, generator=generator)


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
    for view, weight in zip(page_format.views(page_format.pack(*weights)), weights, strict=True):
        assert view.shape == weight.shape
        assert torch.equal(bits(view), bits(weight))


def test_bf16_lies_row_by_row_gate_first():
    gate_up, down = (weight.bfloat16() for weight in random_expert(1, 6, 5))
    page = PageFormat("bf16", 6, 5).pack(gate_up, down)
    expected = [*bits(gate_up).flatten().tolist(), *bits(down).flatten().tolist()]
    assert page.view(torch.int16)[: len(expected)].tolist() == expected
    assert not page[2 * len(expected) :].any()


@pytest.mark.parametrize(
    "page_format, weight_bytes, page_bytes",
    [
        (PageFormat("bf16", 1, 1), 6, 4096),
        (PageFormat("bf16", 32, 64), 12288, 12288),
        (PageFormat("bf16", 32, 65), 12480, 16384),
        # Half a byte a value, and 4 bytes for each group's scale and zero.
        (PageFormat("int4", 64, 128, 32), 12288 + 768 * 4, 16384),
        (PageFormat("int4", 64, 128, 64), 12288 + 384 * 4, 16384),
    ],
)
def test_sizes(page_format, weight_bytes, page_bytes):
    assert (page_format.weight_bytes, page_format.page_bytes) == (weight_bytes, page_bytes)
    page = page_format.pack(*random_expert(2, page_format.hidden, page_format.intermediate))
    assert (page.dtype, page.numel()) == (torch.uint8, page_bytes)


@given(dimensions, dimensions)
def test_pages_are_the_fewest_whole_4_kib(hidden, inner):
    page_format = PageFormat("bf16", hidden, inner)
    assert page_format.page_bytes % 4096 == 0
    assert 0 <= page_format.page_bytes - 6 * hidden * inner < 4096


def test_views_share_the_pages_memory():
    page_format = PageFormat("bf16", 4, 3)
    page = page_format.pack(*random_expert(2, 4, 3))
    page.zero_()
    assert not any(view.any() for view in page_format.views(page))


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
    restored = dequantize_int4(*quantize_int4(weight, group)).tolist()
    for row, restored_row in zip(weight.tolist(), restored, strict=True):
        for start in range(0, len(row), group):
            values = row[start : start + group]
            low, step = min(values), (max(values) - min(values)) / 15
            zero = low + 8 * step
            bound = step / 2 + BF16_ROUNDING * (abs(zero) + 16 * step)
            for value, restored_value in zip(values, restored_row[start : start + group], strict=True):
                assert abs(value - restored_value) <= bound


@pytest.mark.parametrize("value", [0.0, 1.0, -0.03, 1e-6])
def test_int4_of_equal_values(value):
    restored = dequantize_int4(*quantize_int4(torch.full((2, 32), value), 32))
    assert restored.flatten().tolist() == pytest.approx([value] * 64, rel=BF16_ROUNDING, abs=1e-7)


def test_int4_keeps_sixteen_even_levels_exactly():
    weight = torch.arange(32).remainder(16).sub(8.0).expand(3, 32) * 0.25 + 1
    q, scale, zero = quantize_int4(weight, 32)
    assert q.tolist() == [[i % 16 for i in range(32)]] * 3
    assert (scale.unique().tolist(), zero.unique().tolist()) == ([0.25], [1.0])
    assert torch.equal(dequantize_int4(q, scale, zero), weight)


def test_int4_page_holds_the_scales_and_zeros_by_group():
    gate_up, down = random_expert(3, 64, 32)
    page_format = PageFormat("int4", 64, 32, 32)
    _, gate_up_scales_zeros, _, down_scales_zeros = page_format.views(page_format.pack(gate_up, down))
    for weight, stored in ((gate_up, gate_up_scales_zeros), (down, down_scales_zeros)):
        for row, values in enumerate(weight.tolist()):
            for group in range(len(values) // 32):
                part = values[32 * group : 32 * group + 32]
                step = (max(part) - min(part)) / 15
                expected = [step, min(part) + 8 * step]
                assert stored[group, row].tolist() == pytest.approx(expected, rel=2 * BF16_ROUNDING, abs=0.01)


@pytest.mark.parametrize("kind, group", [("bf16", 0), ("int4", 32)])
def test_strides_do_not_matter(kind, group):
    page_format = PageFormat(kind, 64, 32, group)
    gate_up, down = random_expert(4, 64, 32)
    transposed = [weight.t().contiguous().t() for weight in (gate_up, down)]
    assert torch.equal(page_format.pack(*transposed), page_format.pack(gate_up, down))


def test_int4_packing_names_the_processor_the_same_each_time():
    assert int4_packing() == int4_packing()
    assert int(int4_packing(), 16) > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("int3", 64, 64, 32), "unknown page format 'int3'"),
        (("bf16", 0, 64), "positive dimensions"),
        (("bf16", 64, -1), "positive dimensions"),
        (("bf16", 64, 64, 32), "no groups"),
        (("int4", 64, 64), "groups of"),
        (("int4", 64, 64, 128), "groups of"),
        (("int4", 48, 64, 32), "divisible"),
        (("int4", 64, 48, 32), "divisible"),
        (("int4", 96, 64, 64), "divisible"),
        (("int4", 64, 96, 64), "divisible"),
    ],
)
def test_a_format_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PageFormat(*arguments)


@pytest.mark.parametrize("gate_up, down", [((10, 6), (5, 6)), ((5, 6), (6, 5)), ((6, 10), (6, 5)), ((60,), (6, 5))])
def test_weights_of_another_shape_are_refused(gate_up, down):
    with pytest.raises(ValueError, match=r"expected \(\(10, 6\), \(6, 5\)\)"):
        PageFormat("bf16", 6, 5).pack(torch.zeros(gate_up), torch.zeros(down))
