"""MoeShape: what a model's MoE layers are like."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MoeShape:
    """Dimensions of a model's MoE layers.

    Args:
        layers: decoder layers that are MoE layers, in order.
        experts: E. top_k: K. hidden: H. intermediate: I of an expert. vocabulary: tokens.
        context: longest sequence the model takes; None where it does not say.
    """

    layers: tuple[int, ...]
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    vocabulary: int
    context: int | None
