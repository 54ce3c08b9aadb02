"""Dense weights rounded to int8 or int4, without training: attention, shared experts, the head.

A token reads all of them: in bfloat16 they take longer than the int4 experts that it uses.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

import torch

from cachemoe.kernels.rounded_cpu import Rounded
from cachemoe.moe.doors import NoBackward
from cachemoe.moe.layers import is_experts, moe_layers
from cachemoe.moe.progress import Progress

FEWEST_ROWS = 16  # a matrix of fewer is no weight to speak of: a gate of one row, say


class RoundedLinear(torch.nn.Module):
    """A ``torch.nn.Linear`` for inference, whose weight is rounded."""

    def __init__(self, linear: torch.nn.Linear, rounded: Rounded):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.register_buffer("packed", rounded.packed)
        self.register_buffer("scales", rounded.scales)
        self.bits, self.group = rounded.bits, rounded.group

    @property
    def rounded(self) -> Rounded:
        return Rounded(self.packed, self.scales, self.bits, self.group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.rounded.times(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
            y = (y if self.bias is None else y + self.bias).to(x.dtype)
        return NoBackward.apply(y, x) if torch.is_grad_enabled() and x.requires_grad else y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, int{self.bits}"

    def _apply(self, function, recurse=True):
        """Of ``.to()`` and others the bias alone: rounded numbers and their scales stay what they are."""
        if self.bias is not None:
            self.bias.data = function(self.bias.data)
        return self


@dataclass(frozen=True)
class DenseRounding:
    """What rounding a model's dense weights did.

    Args:
        kind: ``int8`` or ``int4``.
        bytes_before, bytes_after: of the matrices that were rounded.
        errors: of each layer, and of what is beside them by its name, the relative error: root mean square of the
            difference over that of the weights.
    """

    kind: str
    bytes_before: int
    bytes_after: int
    errors: dict[str, float]


def round_dense(model, kind: str, progress: Progress) -> DenseRounding:
    """Replace every ``torch.nn.Linear`` of a model on the CPU that has weights to speak of, but the routers.

    Args:
        kind: of ``KINDS``; int4 leaves matrices as they are whose columns no group divides.
    """
    found = _rounded(model, kind)
    squares, before, after = defaultdict(lambda: [0.0, 0.0]), 0, 0
    with progress(f"rounding {len(found)} dense matrices to {kind}", len(found)) as advance:
        for parent, path, name, linear in found:
            weight = linear.weight.detach()
            rounded = Rounded.of(weight, kind)
            of = squares[_place(path)]
            of[0] += float((rounded.numbers(torch.float32) - weight.float()).square().sum(dtype=torch.float64))
            of[1] += float(weight.float().square().sum(dtype=torch.float64))
            before, after = before + weight.nbytes, after + rounded.nbytes
            setattr(parent, name, RoundedLinear(linear, rounded))
            advance()
    errors = {place: (off / max(own, 1e-300)) ** 0.5 for place, (off, own) in squares.items()}
    return DenseRounding(kind, before, after, errors)


def dense_reads(model, kind: str | None) -> dict[str, int]:
    """Bytes of all weights but the experts' that a token reads in a model's language part and its head.

    An embedding is left out, since a token reads one row of it; a head that is tied to it is read whole.

    Args:
        model: on any device; its parameters' shapes and dtypes are enough.
        kind: what ``round_dense`` will be called with; None: it will not be.

    Returns:
        By the kind of rounding, and for what is not rounded by the dtype's name.
    """
    rounded = set() if kind is None else {linear for *_, linear in _rounded(model, kind)}
    parts = (part for part in (model.get_decoder(), model.get_output_embeddings()) if part is not None)
    reads = defaultdict(int)
    for module in dict.fromkeys(module for part in parts for module in part.modules()):
        if isinstance(module, torch.nn.Embedding) or is_experts(module):
            continue
        for parameter in module.parameters(recurse=False):
            if module in rounded and parameter is module.weight:
                reads[kind] += Rounded.size(*parameter.shape, kind)
            else:
                reads[str(parameter.dtype).removeprefix("torch.")] += parameter.nbytes
    return dict(reads)


def _rounded(model, kind: str) -> list[tuple[torch.nn.Module, str, str, torch.nn.Linear]]:
    """What ``round_dense`` rounds: each ``torch.nn.Linear``'s parent, its path, its name in the parent, and itself."""
    routers = {layer.router for layer in moe_layers(model)}
    return [
        (parent, f"{path}.{name}".lstrip("."), name, child)
        for path, parent in model.named_modules()
        for name, child in parent.named_children()
        if type(child) is torch.nn.Linear and child not in routers and parent not in routers
        if child.out_features >= FEWEST_ROWS and Rounded.fits(child.in_features, kind)
    ]


def _place(path: str) -> str:
    """``layer 3`` of what is in the third layer, else the module's own path."""
    layer = re.search(r"\.(\d+)\.", path)
    return f"layer {layer[1]}" if layer else path
