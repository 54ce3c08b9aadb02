"""How the slots of a pool are shared among layers: against every way to share them."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from cachemoe.moe.budgets import budgets
from cachemoe.moe.calibration import Calibration
from cachemoe.offload.errors import InputError

LAYERS, EXPERTS = 3, 6


def random_misses(seed, k=2, layers=LAYERS, experts=EXPERTS):
    """Falling with the capacity, as LRU's are; whole numbers, so that many sums tie."""
    generator = torch.Generator().manual_seed(seed)
    falls = torch.randint(0, 5, (layers, experts + 1), generator=generator).float()
    misses = falls.flip(1).cumsum(1).flip(1)
    misses[:, :k] = math.inf
    return misses


def shares(total, layers=LAYERS, experts=EXPERTS):
    """Every way to share slots."""
    return [share for share in product(range(experts + 1), repeat=layers) if sum(share) == total]


def missed(misses, share):
    return sum(float(row[slots]) for row, slots in zip(misses, share, strict=True))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("k", [1, 2, 4])
def test_no_other_way_misses_less(seed, k):
    misses = random_misses(seed, k)
    for total in range(LAYERS * k, LAYERS * EXPERTS + 1):
        found = budgets(misses, total)
        least = min(missed(misses, share) for share in shares(total))
        assert sum(found) == total and min(found) >= k and max(found) <= EXPERTS
        assert missed(misses, found) == least < math.inf


@pytest.mark.parametrize("seed", range(4))
def test_misses_that_do_not_fall_evenly(seed):
    generator = torch.Generator().manual_seed(seed)
    misses = torch.rand(LAYERS, EXPERTS + 1, generator=generator)
    misses[0, :3], misses[1, :1], misses[2, :2] = math.inf, math.inf, math.inf
    for total in range(6, LAYERS * EXPERTS + 1):
        found = budgets(misses, total)
        assert sum(found) == total
        assert missed(misses, found) == pytest.approx(min(missed(misses, share) for share in shares(total)))


@pytest.mark.parametrize("seed", range(4))
def test_never_worse_than_even_shares(seed):
    misses = random_misses(seed, 2, layers=8, experts=12)
    for each in range(2, 13):
        assert missed(misses, budgets(misses, 8 * each)) <= missed(misses, [each] * 8)


def test_of_ways_that_miss_as_little_the_last_layers_get_fewer():
    alike = torch.zeros(LAYERS, EXPERTS + 1)
    alike[:, :2] = math.inf
    assert budgets(alike, 9) == [5, 2, 2]
    assert budgets(alike, 12) == [6, 4, 2]
    for seed in range(6):
        misses = random_misses(seed)
        for total in (7, 9, 13):
            best = min(shares(total), key=lambda share: (missed(misses, share), share[::-1]))
            assert tuple(budgets(misses, total)) == best


def test_layers_that_need_no_more_give_theirs_away():
    misses = torch.tensor([[math.inf, 5.0, 0.0, 0.0, 0.0, 0.0], [math.inf, 50.0, 40.0, 30.0, 20.0, 10.0]])
    assert budgets(misses, 6) == [1, 5]  # the fifth slot of the second saves 10, the second of the first 5
    assert budgets(misses, 7) == [2, 5]


@pytest.mark.parametrize("total", [0, 5, LAYERS * EXPERTS + 1, -1])
def test_slots_that_cannot_be_shared_raise(total):
    with pytest.raises(ValueError, match="slots cannot be shared among 3 layers, which take 6 at least"):
        budgets(random_misses(0, 2), total)


def save_with_misses(source, path, misses):
    replace(Calibration.load(source), misses=misses).save(path)
    return path


def test_load_gives_the_layers_those_capacities(opened, tiny_calibration, tmp_path):
    """The first layer would miss as often with two slots as with all, and the second has use for every one."""
    misses = torch.full((2, 9), 1.0)
    misses[1] = torch.arange(8, -1, -1)
    misses[:, :2] = math.inf
    path = save_with_misses(tiny_calibration, tmp_path / "calibration", misses)
    model = opened(calibration=path, capacity="adaptive", pool=4)
    assert model.cachemoe.engine.state.capacity.tolist() == [2, 6] == budgets(misses, 8)
    assert [layer.slots for layer in model.cachemoe.layers] == [2, 6]
    even = opened(calibration=path, pool=4)
    assert even.cachemoe.engine.state.capacity.tolist() == [4, 4]
    with torch.inference_mode():
        tokens = torch.tensor([[1, 50, 200, 7, 7, 30]])
        torch.testing.assert_close(model(tokens).logits, even(tokens).logits)


def test_load_with_the_calibration_as_it_was_made(opened, tiny_calibration):
    known = Calibration.load(tiny_calibration)
    for pool in (2, 5, 8):
        model = opened(calibration=tiny_calibration, capacity="adaptive", pool=pool)
        assert model.cachemoe.engine.state.capacity.tolist() == budgets(known.misses, 2 * pool)


def test_each_layer_gets_what_its_strategy_needs_at_least(opened, tiny_calibration, tmp_path):
    misses = torch.full((2, 9), 1.0)
    misses[1] = torch.arange(8, -1, -1)
    misses[:, :2] = math.inf
    path = save_with_misses(tiny_calibration, tmp_path / "calibration", misses)
    model = opened(calibration=path, capacity="adaptive", pool=5, routing="relu-route")
    assert model.cachemoe.engine.state.capacity.tolist() == [4, 6]
    model.cachemoe.resize(6)  # shared again
    assert model.cachemoe.engine.state.capacity.tolist() == [4, 8]
    with pytest.raises(InputError, match="the pool cannot be shared among the layers: 6 slots cannot be"):
        model.cachemoe.resize(3)


def test_what_cannot_be_is_refused_in_a_sentence(opened, tiny_calibration, tmp_path):
    for options, words in (
        ({"capacity": "fair", "calibration": tiny_calibration}, "capacity is even or adaptive, not 'fair'"),
        ({"capacity": "adaptive"}, "an adaptive capacity needs a calibration of the model: make one with"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            opened(**options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(3, 9), (2, 5), (2, 17)])
def test_a_calibration_of_another_model_is_refused(opened, tiny_calibration, tmp_path, shape):
    layers, count = shape
    experts = torch.arange(count - 1, dtype=torch.int16).expand(layers, -1)
    misses = torch.ones(shape)
    misses[:, :2] = math.inf
    other = replace(
        Calibration.load(tiny_calibration),
        misses=misses,
        removal=experts,
        ratios=torch.zeros(layers, 1001),
        thresholds=torch.zeros(layers),
        sensitivities=torch.ones(layers),
        token_ids=torch.tensor([0], dtype=torch.int32),
        by_token=torch.zeros(layers, 2, count - 1, dtype=torch.float16),
        clusters=torch.zeros(3, layers, count - 1, dtype=torch.int16),
        importance=torch.zeros(layers, count - 1),
    )
    other.save(tmp_path / "other")
    for pool in (2, 8):
        with pytest.raises(InputError, match="the calibration is of another model, tiny"):
            opened(calibration=tmp_path / "other", capacity="adaptive", pool=pool)
