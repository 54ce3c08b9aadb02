"""A layer's experts as a base that they share and residuals of low rank: surrogates that are always resident.

Each matrix of expert e is base + B_e A_e, the base being the experts' mean, B_e A_e the truncated singular value
decomposition of what is left. An expert that is absent is then computed without a byte being moved. This stands in for
the low-rank experts of Omni-SMoLA (arXiv 2312.00968), which are trained. Experts of real models are nearly orthogonal
to each other, so that the mean tells little of any: the error at small ranks is large, and has to be measured.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cachemoe.kernels.activations import activate
from cachemoe.kernels.formats import PageFormat
from cachemoe.offload.errors import InputError

ROUNDS = 20  # at most, of alignment; tinymoe's layers take 5 to 16


@dataclass(frozen=True)
class Factored:
    """One matrix of every expert: base + left @ right.

    Args:
        base: ``[rows, columns]``.
        left: ``[E, rows, r]``, B.
        right: ``[E, r, columns]``, A.
    """

    base: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    def to(self, device: torch.device | str) -> "Factored":
        """On another device."""
        return Factored(*(each.to(device) for each in (self.base, self.left, self.right)))

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, rows]`` the base's product with x ``[n, columns]``."""
        return F.linear(x, self.base.to(x.dtype))

    def own(self, x: torch.Tensor, e: int) -> torch.Tensor:
        """``[n, rows]`` what one expert's residual adds."""
        return F.linear(F.linear(x, self.right[e].to(x.dtype)), self.left[e].to(x.dtype))


@dataclass(frozen=True)
class LowRank:
    """The surrogates of a layer's experts.

    Args:
        gate_up: rows in the format's order.
        down: the second matrix.
        biases: ``gate_up_bias`` ``[E, rows]`` and ``down_bias`` ``[E, H]``, whole, where the format has them.
        page_format: of the experts; its kind does not matter.
    """

    gate_up: Factored
    down: Factored
    biases: dict[str, torch.Tensor]
    page_format: PageFormat

    @property
    def bytes(self) -> int:
        """That all surrogates of the layer take together."""
        matrices = (t for each in (self.gate_up, self.down) for t in (each.base, each.left, each.right))
        return sum(t.numel() * t.element_size() for t in (*matrices, *self.biases.values()))

    def to(self, device: torch.device | str) -> "LowRank":
        """On another device."""
        biases = {name: bias.to(device) for name, bias in self.biases.items()}
        return LowRank(self.gate_up.to(device), self.down.to(device), biases, self.page_format)

    def apply(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Several experts' surrogates on the same tokens; the base's product with x is computed once.

        Args:
            x: ``[n, H]`` floating point, in whose dtype the products are.
            experts: ``[J]`` integers.

        Returns:
            ``[J, n, H]`` float32; an expert's bits do not depend on the others.
        """
        shared, outputs = self.gate_up.shared(x), []
        for e in experts.tolist():
            rows = shared + self.gate_up.own(x, e)
            if self.biases:
                rows = rows + self.biases["gate_up_bias"][e].to(x.dtype)
            h = activate(rows, self.page_format)
            y = self.down.shared(h) + self.down.own(h, e)
            if self.biases:
                y = y + self.biases["down_bias"][e].to(x.dtype)
            outputs.append(y.float())
        return torch.stack(outputs) if outputs else x.new_zeros(0, *x.shape, dtype=torch.float32)


def low_rank(
    weights: dict[str, torch.Tensor],
    frequency: torch.Tensor,
    rank: int,
    page_format: PageFormat,
    dtype: torch.dtype = torch.bfloat16,
) -> LowRank:
    """The surrogates of a layer's experts, as they are: ``aligned`` comes before.

    Args:
        weights: ``gate_up`` ``[E, 2I, H]`` (ungated: ``[E, I, H]``), ``down`` ``[E, H, I]``, and ``gate_up_bias``
            ``[E, rows]`` and ``down_bias`` ``[E, H]`` where the format has them; floating point.
        frequency: ``[E]``, how often each is chosen: its part in the mean. Not negative, and not all 0.
        rank: r, of the residuals; a matrix that has a lower rank keeps its own. At 0 all experts are the mean.
        page_format: of the experts; its kind does not matter.
        dtype: of base and factors; the rounding of the base is part of the residual.

    Raises:
        InputError: if the rank is above that of both matrices, or negative, or a weight is not finite.
    """
    most = max(min(weights[name].shape[1:]) for name in ("gate_up", "down"))
    if not 0 <= rank <= most:
        raise InputError(f"the residuals of these experts have ranks of 0 to {most}, and {rank} was asked for")
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise InputError("the experts have weights that are not finite: they have no low rank")
    share = frequency.double() / frequency.double().sum()
    matrices = {name: _factored(weights[name], share, rank, dtype) for name in ("gate_up", "down")}
    biases = {name: weights[name].float() for name in ("gate_up_bias", "down_bias") if page_format.bias}
    return LowRank(**matrices, biases=biases, page_format=page_format)


def _factored(experts: torch.Tensor, share: torch.Tensor, rank: int, dtype: torch.dtype) -> Factored:
    base = _mean(experts, share).to(dtype)
    factors = []
    for expert in experts:
        u, s, v = torch.linalg.svd(expert.float() - base.float(), full_matrices=False)
        root = s[:rank].sqrt()
        factors.append(((u[:, :rank] * root).to(dtype), (root[:, None] * v[:rank]).to(dtype)))
    left, right = zip(*factors, strict=True)
    return Factored(base, torch.stack(left), torch.stack(right))


def aligned(
    weights: dict[str, torch.Tensor], frequency: torch.Tensor, page_format: PageFormat
) -> dict[str, torch.Tensor]:
    """The same experts, each with its I neurons in the order that brings it closest to the mean of all.

    A neuron is its row of gate, its row of up, its column of down, and its biases: in whatever order an expert has
    them, it computes the same. Each expert's neurons are paired with the mean's, again and again, until no order gets
    better; once beginning with the mean, once with the expert that is chosen most in its place, and the better counts.
    What is weighed is what the mean leaves of the experts, the sum of their squared residuals by frequency: it is never
    more than with the orders as they were.

    Args:
        weights, frequency, page_format: as for ``low_rank``.

    Returns:
        The weights in the new order.
    """
    share = frequency.double() / frequency.double().sum()
    rows = _rows(page_format)
    neurons = _neurons(weights, rows)
    starts = _mean(neurons, share), neurons[int(share.argmax())]
    orders = [_orders(neurons, target, share) for target in starts]
    return _ordered(weights, min(orders, key=lambda each: _left(neurons, each, share)), rows)


def _orders(neurons: torch.Tensor, target: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """``[E, I]`` the order of each expert's neurons: like a first target ``[I, parts]``, then like the mean."""
    orders = torch.arange(neurons.shape[1]).repeat(len(neurons), 1)
    for _ in range(ROUNDS):
        moved = False
        for e, order in enumerate(orders):
            alike = target @ neurons[e, order].T
            found = _pairs(alike)
            if alike.gather(1, found[:, None]).double().sum() > alike.diagonal().double().sum():
                orders[e], moved = order[found], True
        target = _mean(_taken(neurons, orders), share)
        if not moved:
            break
    return orders


def _taken(neurons: torch.Tensor, orders: torch.Tensor) -> Iterator[torch.Tensor]:
    """``[I, parts]`` of each expert the neurons in its order; one expert's in memory at a time."""
    return (each[order] for each, order in zip(neurons, orders, strict=True))


def _pairs(alike: torch.Tensor) -> torch.Tensor:
    """``[I]`` the neuron for each place, from similarities ``[place, neuron]``, the most alike first.

    Pairs each of which is the other's best are those that come first in some order of descending similarity, so all of
    them are made at once.
    """
    alike, found, places = alike.clone(), torch.full((len(alike),), -1), torch.arange(len(alike))
    while (open_ := found < 0).any():
        best, best_place = alike.argmax(1), alike.argmax(0)
        both = open_ & (best_place[best] == places)
        found[both] = best[both]
        alike[both], alike[:, best[both]] = -torch.inf, -torch.inf
    return found


def _rows(page_format: PageFormat) -> torch.Tensor:
    """``[I, 2]`` each neuron's rows of ``gate_up``, or ``[I, 1]`` without a gate."""
    inner = torch.arange(page_format.intermediate)
    if not page_format.gated:
        return inner[:, None]
    if page_format.interleaved:
        return torch.stack((2 * inner, 2 * inner + 1), 1)
    return torch.stack((inner, inner + len(inner)), 1)


def _neurons(weights: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """``[E, I, parts]`` float32."""
    parts = [weights["gate_up"][:, rows].flatten(2), weights["down"].transpose(1, 2)]
    if "gate_up_bias" in weights:
        parts.append(weights["gate_up_bias"][:, rows])
    return torch.cat([part.float() for part in parts], 2)


def _ordered(weights: dict[str, torch.Tensor], orders: torch.Tensor, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The experts with their neurons in these orders, ``[E, I]``."""
    of_rows = torch.empty(len(orders), rows.numel(), dtype=torch.int64)
    of_rows[:, rows.flatten()] = rows[orders].flatten(1)
    new = dict(weights)
    for name in ("gate_up", "gate_up_bias"):
        if name in weights:
            new[name] = torch.stack([expert[each] for expert, each in zip(weights[name], of_rows, strict=True)])
    new["down"] = torch.stack([expert[:, each] for expert, each in zip(weights["down"], orders, strict=True)])
    return new


def _mean(experts: Iterable[torch.Tensor], share: torch.Tensor) -> torch.Tensor:
    """``[...]`` float32, of E tensors ``[...]``, by share."""
    return sum(part * each.double() for part, each in zip(share, experts, strict=True)).float()


def _left(neurons: torch.Tensor, orders: torch.Tensor, share: torch.Tensor) -> float:
    """What the mean leaves of experts in these orders: the sum of squared residuals by share."""
    mean = _mean(_taken(neurons, orders), share)
    residuals = ((each - mean).double().square().sum() for each in _taken(neurons, orders))
    return float(sum(part * each for part, each in zip(share, residuals, strict=True)))
