"""The experts of a layer in plain PyTorch: the specification that the kernels are held to."""

import torch

from cachemoe.kernels.activations import activate
from cachemoe.kernels.formats import PageFormat


def experts(
    x: torch.Tensor, slots: torch.Tensor, gates: torch.Tensor, weights: dict[str, torch.Tensor], page_format: PageFormat
) -> torch.Tensor:
    """y[t] = sum over k of gates[t, k] * down[s](act(gate[s] x[t]) * (up[s] x[t])), s = slots[t, k].

    Args:
        x: ``[T, H]``.
        slots, gates: ``[T, K]``; slot -1: a dropped expert, which has no part in the sum.
        weights: ``gate_up`` ``[S, 2I, H]`` and ``down`` ``[S, H, I]`` as numbers, and the biases where there are any.
        page_format: what is computed with them; its kind does not matter.

    Returns:
        ``[T, H]`` in x's dtype; accumulated in float32.
    """
    weights = {name: weight.float() for name, weight in weights.items()}
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for k in range(slots.shape[1]):
        s = slots[:, k]
        rows = torch.einsum("th,tih->ti", x.float(), weights["gate_up"][s])
        if page_format.bias:
            rows += weights["gate_up_bias"][s]
        result = torch.einsum("ti,thi->th", activate(rows, page_format), weights["down"][s])
        if page_format.bias:
            result += weights["down_bias"][s]
        y += torch.where(s[:, None] < 0, 0.0, gates[:, k, None].float() * result)
    return y.to(x.dtype)
