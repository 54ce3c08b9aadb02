"""Surrogates of low rank against the experts themselves, and alignment against orders that were planted."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachemoe.kernels.formats import PageFormat
from cachemoe.kernels.reference_experts import experts as reference
from cachemoe.moe.low_rank import aligned, low_rank
from cachemoe.offload.errors import InputError

E, H, I = 5, 12, 8
SWIGLU = PageFormat("fp32", H, I)
FORMATS = {
    "swiglu": SWIGLU,
    "without a gate": PageFormat("fp32", H, I, gated=False, activation="relu"),
    "gpt-oss": PageFormat("fp32", H, I, activation="clamped-swiglu", bias=True, interleaved=True),
}
FULL = 12  # the rank of gate_up: [16, 12]; ungated and down have 8


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights_of(page_format, seed=0, count=E):
    rows = (2 if page_format.gated else 1) * page_format.intermediate
    made = {"gate_up": random(seed, count, rows, H), "down": random(seed + 1, count, H, page_format.intermediate)}
    if page_format.bias:
        made |= {"gate_up_bias": random(seed + 2, count, rows), "down_bias": random(seed + 3, count, H)}
    return made


def outputs_of(weights, page_format, x):
    """``[E, n, H]`` of the experts themselves."""
    ones = torch.ones(len(x), 1)
    every = [torch.full((len(x), 1), e) for e in range(len(weights["down"]))]
    return torch.stack([reference(x, slots, ones, weights, page_format) for slots in every])


def shuffled(weights, page_format, orders):
    """Each expert's neurons in another order, matrix by matrix and row by row."""
    new = {name: tensor.clone() for name, tensor in weights.items()}
    inner = page_format.intermediate
    for e, order in enumerate(orders):
        for place, neuron in enumerate(order):
            new["down"][e, :, place] = weights["down"][e, :, neuron]
            if not page_format.gated:
                rows = [(place, neuron)]
            elif page_format.interleaved:
                rows = [(2 * place, 2 * neuron), (2 * place + 1, 2 * neuron + 1)]
            else:
                rows = [(place, neuron), (inner + place, inner + neuron)]
            for name in ("gate_up", "gate_up_bias"):
                if name in weights:
                    for to, source in rows:
                        new[name][e, to] = weights[name][e, source]
    return new


def orders(seed, count=E, inner=I):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(inner, generator=generator).tolist() for _ in range(count)]


def left_by_mean(weights, frequency):
    """The squared residuals to the mean, by frequency."""
    share = frequency / frequency.sum()
    total = 0.0
    for tensor in (tensor for name, tensor in weights.items() if name != "down_bias"):
        mean = sum(part * each for part, each in zip(share, tensor, strict=True))
        total += sum(float(part * (each - mean).square().sum()) for part, each in zip(share, tensor, strict=True))
    return total


@pytest.fixture(params=FORMATS)
def page_format(request):
    return FORMATS[request.param]


@pytest.fixture
def uneven():
    return torch.tensor([3.0, 0.0, 1.0, 10.0, 2.0])


def full_rank(page_format):
    return FULL if page_format.gated else I


# ------------------------------------------------------------------------------------------------------ the surrogates


@pytest.mark.parametrize("rank_first", [False, True])
def test_at_full_rank_a_surrogate_is_the_expert(page_format, uneven, rank_first):
    weights, x = weights_of(page_format), random(9, 4, H)
    if rank_first:
        weights = aligned(weights, uneven, page_format)
    made = low_rank(weights, uneven, full_rank(page_format), page_format, torch.float32)
    chosen = torch.tensor([3, 0, 4])
    found = made.apply(x, chosen)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, outputs_of(weights, page_format, x)[chosen], rtol=1e-4, atol=1e-4)


def test_what_it_computes_at_any_rank(page_format, uneven):
    """Base and residual of each matrix as one matrix, in the reference."""
    weights, x = weights_of(page_format), random(9, 4, H)
    made = low_rank(weights, uneven, 3, page_format, torch.float32)
    share, whole = uneven / uneven.sum(), dict(weights)
    for name in ("gate_up", "down"):
        mean = sum(part * each for part, each in zip(share, weights[name], strict=True))
        torch.testing.assert_close(getattr(made, name).base, mean)
        u, s, v = torch.linalg.svd(weights[name] - mean, full_matrices=False)
        whole[name] = mean + (u[:, :, :3] * s[:, None, :3]) @ v[:, :3]
    found = made.apply(x, torch.arange(E))
    torch.testing.assert_close(found, outputs_of(whole, page_format, x), rtol=1e-4, atol=1e-4)


def test_the_error_falls_with_the_rank_by_the_singular_values(page_format, uneven):
    weights, errors = weights_of(page_format), []
    for rank in range(full_rank(page_format) + 1):
        made = low_rank(weights, uneven, rank, page_format, torch.float32)
        matrices = {name: getattr(made, name) for name in ("gate_up", "down")}
        left = {name: weights[name] - (m.base + m.left @ m.right) for name, m in matrices.items()}
        for name, m in matrices.items():
            discarded = torch.linalg.svdvals(weights[name] - m.base)[:, rank:]
            torch.testing.assert_close(left[name].square().sum((1, 2)), discarded.square().sum(1), rtol=1e-3, atol=1e-6)
        errors.append(math.sqrt(sum(float(each.square().sum()) for each in left.values())))
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-4 * errors[0]


def test_at_rank_0_every_surrogate_is_the_mean_expert():
    weights, x = weights_of(SWIGLU), random(9, 3, H)
    found = low_rank(weights, torch.ones(E), 0, SWIGLU, torch.float32).apply(x, torch.arange(E))
    assert torch.equal(found, found[:1].expand_as(found))


def test_in_bfloat16_it_is_as_exact_as_bfloat16_is(page_format, uneven):
    weights, x = weights_of(page_format), random(9, 4, H)
    made = low_rank(weights, uneven, full_rank(page_format), page_format)
    exact = outputs_of(weights, page_format, x)
    error = (made.apply(x, torch.arange(E)) - exact).norm() / exact.norm()
    assert made.gate_up.base.dtype == made.down.left.dtype == torch.bfloat16 and error < 0.01
    assert made.apply(x.bfloat16(), torch.arange(E)).dtype == torch.float32


def test_an_experts_bits_do_not_depend_on_the_others(page_format, uneven):
    made, x = low_rank(weights_of(page_format), uneven, 4, page_format), random(9, 4, H)
    together = made.apply(x, torch.arange(E))
    for e in range(E):
        assert torch.equal(made.apply(x, torch.tensor([e]))[0], together[e])
    assert torch.equal(made.apply(x, torch.tensor([4, 1, 4])), together[[4, 1, 4]])
    assert made.apply(x, torch.tensor([], dtype=torch.int64)).shape == (0, 4, H)


def test_its_bytes(page_format):
    made = low_rank(weights_of(page_format), torch.ones(E), 3, page_format)
    rows = (2 if page_format.gated else 1) * I
    numbers = rows * H + H * I + E * 3 * (rows + H + H + I)
    assert made.bytes == 2 * numbers + (4 * E * (rows + H) if page_format.bias else 0)


@pytest.mark.parametrize("rank", [-1, FULL + 1])
def test_a_rank_that_the_matrices_have_not_is_refused(rank):
    with pytest.raises(InputError, match=f"these experts have ranks of 0 to {FULL}, and {rank} was asked for"):
        low_rank(weights_of(SWIGLU), torch.ones(E), rank, SWIGLU)


def test_weights_that_are_not_finite_are_refused():
    weights = weights_of(SWIGLU)
    weights["down"][2, 3, 4] = math.inf
    with pytest.raises(InputError, match="weights that are not finite"):
        low_rank(weights, torch.ones(E), 2, SWIGLU)


# -------------------------------------------------------------------------------------------------------- the alignment


@pytest.mark.parametrize("seed", range(3))
def test_alignment_changes_no_output(page_format, uneven, seed):
    weights, x = weights_of(page_format, seed), random(seed + 9, 3, H)
    new = aligned(weights, uneven, page_format)
    assert not torch.equal(new["down"], weights["down"])
    exact = outputs_of(weights, page_format, x)
    torch.testing.assert_close(outputs_of(new, page_format, x), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_a_planted_order_is_recovered(page_format, uneven, noise, seed):
    copies = {name: tensor[:1].repeat_interleave(E, 0) for name, tensor in weights_of(page_format, seed).items()}
    copies = {name: tensor + noise * random(seed + 5, *tensor.shape) for name, tensor in copies.items()}
    found = aligned(shuffled(copies, page_format, orders(seed)), uneven, page_format)
    heaviest = orders(seed)[int(uneven.argmax())]
    expected = shuffled(copies, page_format, [heaviest] * E)  # all are in the order of the one that is chosen most
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


@given(st.integers(0, 10**6), st.lists(st.integers(0, 9), min_size=E, max_size=E).filter(any))
def test_alignment_never_leaves_more_to_the_residuals(seed, counts):
    frequency, weights = torch.tensor(counts).float(), weights_of(SWIGLU, seed)
    new = aligned(weights, frequency, SWIGLU)
    assert left_by_mean(new, frequency) <= left_by_mean(weights, frequency) * (1 + 1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_alignment_leaves_no_more_where_experts_are_alike_as_they_are_but_the_one_chosen_most(seed):
    weights = {name: tensor[:1] + random(seed + 5, *tensor.shape) for name, tensor in weights_of(SWIGLU, seed).items()}
    for name, tensor in weights.items():
        tensor[0] = random(seed + 7, *weights[name].shape[1:])
    frequency = torch.tensor([1.01, 1.0, 1.0, 1.0, 1.0])
    assert left_by_mean(aligned(weights, frequency, SWIGLU), frequency) <= left_by_mean(weights, frequency) * (1 + 1e-5)


def test_alignment_of_shuffled_copies_makes_low_ranks_fit(page_format):
    copies = {name: tensor[:1].repeat_interleave(E, 0) for name, tensor in weights_of(page_format).items()}
    copies = {name: tensor + 0.1 * random(7, *tensor.shape) for name, tensor in copies.items()}
    weights, x = shuffled(copies, page_format, orders(3)), random(9, 6, H)
    exact, errors = outputs_of(weights, page_format, x), []
    for each in (weights, aligned(weights, torch.ones(E), page_format)):
        found = low_rank(each, torch.ones(E), 2, page_format, torch.float32).apply(x, torch.arange(E))
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[1] < errors[0] / 2
