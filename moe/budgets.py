"""How many slots each layer gets of a pool: by dynamic programming over what each layer would miss (after AdapMoE).

AdapMoE (arXiv 2408.10284) estimates a layer's misses from two probabilities, as if all experts were used alike; the
misses that a calibration text has in each capacity need no such estimate.
"""

import torch

from cachemoe.moe.calibration import Calibration
from cachemoe.offload.errors import InputError


def budgets(misses: torch.Tensor, total: int, least: int = 0) -> list[int]:
    """The slots of each layer that miss least together; of several ways, the one with fewer slots in the last layers.

    Args:
        misses: ``[L, E + 1]``, of each layer in each capacity, infinite where it cannot be.
        total: slots of all layers together.
        least: slots of each layer.

    Raises:
        ValueError: if there are too few slots, or more than experts.
    """
    layers, capacities = misses.shape
    costs = misses.double()
    costs[:, :least] = torch.inf
    needed = sum(int(row.isfinite().float().argmax()) for row in costs)
    if not needed <= total <= layers * (capacities - 1):
        raise ValueError(f"{total} slots cannot be shared among {layers} layers, which take {needed} at least")
    best = torch.full((total + 1,), torch.inf, dtype=torch.float64)  # of the layers so far, with so many slots
    best[0], choices = 0.0, []
    for row in costs:
        new, choice = torch.full_like(best, torch.inf), torch.zeros(total + 1, dtype=torch.int64)
        for slots in range(min(capacities, total + 1)):
            with_slots = torch.full_like(best, torch.inf)
            with_slots[slots:] = best[: total + 1 - slots] + row[slots]
            better = with_slots < new
            new[better], choice[better] = with_slots[better], slots
        best = new
        choices.append(choice)
    slots = []
    for choice in reversed(choices):
        slots.append(int(choice[total]))
        total -= slots[-1]
    return slots[::-1]


def adaptive_slots(even: list[int], calibration: Calibration, least: int) -> list[int]:
    """As many slots as ``even`` has, shared as the calibration's misses say.

    Args:
        least: slots that each layer needs.

    Raises:
        InputError: if there are too few.
    """
    try:
        return budgets(calibration.misses, sum(even), least)
    except ValueError as error:
        raise InputError(f"the pool cannot be shared among the layers: {error}") from error
