"""Which experts keep a finer format, so that the loss is what is tolerated (EdgeMoE, arXiv 2308.14352, offline)."""

from collections.abc import Callable

import torch

from cachemoe.offload.errors import InputError

TOLERANCE = 0.05  # share of what is tolerated by which the loss may stay below it, for the sake of fewer evaluations


def assign_levels(
    importance: torch.Tensor,
    tolerated: float,
    loss_of: Callable[[torch.Tensor], float],
    levels: int = 2,
) -> torch.Tensor:
    """The level of each expert: the least important are one level cheaper than the rest, as many as is tolerated.

    Of all experts at one level, the cheapest level that loses no more than is tolerated is found; of the next cheaper
    one as many experts have it as bring the loss to what is tolerated, found by bisection, as if each expert more
    brought more loss. The loss is asked for at most ``levels`` + log2(L E) times, rounded up.

    Args:
        importance: ``[L, E]``, of each expert: what is lost if it alone is cheaper. Of equals the first is cheaper.
        tolerated: P, in the unit of the loss.
        loss_of: from ``[L, E]`` int64 levels to the loss; one that is not a number counts as not tolerated.
        levels: how many there are: 0 the finest, ``levels`` - 1 the cheapest.

    Returns:
        ``[L, E]`` int64, of which ``loss_of`` has said that it is tolerated.

    Raises:
        InputError: if not even the finest level's loss is tolerated.
    """

    def loss_at(level: int) -> float:
        return loss_of(torch.full(importance.shape, level))

    level, loss = levels - 1, loss_at(levels - 1)
    while not loss <= tolerated:
        if level == 0:
            raise InputError(
                f"all experts at their finest level lose {loss:.4g}, more than the {tolerated:.4g} that is tolerated: "
                "tolerate more, or pack a finer format"
            )
        level -= 1
        loss = loss_at(level)
    found = torch.full(importance.shape, level)
    if level == levels - 1:
        return found
    order = importance.flatten().argsort(stable=True)
    most, too_many = 0, len(order)  # experts at the cheaper level
    while too_many - most > 1 and not loss >= (1 - TOLERANCE) * tolerated:
        count = (most + too_many) // 2
        trial = torch.full((len(order),), level)
        trial[order[:count]] = level + 1
        trial = trial.view(importance.shape)
        if (trial_loss := loss_of(trial)) <= tolerated:
            most, found, loss = count, trial, trial_loss
        else:
            too_many = count
    return found
