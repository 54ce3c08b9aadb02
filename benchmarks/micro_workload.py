"""What the expert benchmarks compute with: a pool of random pages, tokens, and the slots that each call reads."""

from dataclasses import dataclass
from math import ceil

import torch

from cachemoe.benchmarks.geometries import GEOMETRIES
from cachemoe.kernels.formats import PageFormat

WORKING_SET = 512 << 20  # bytes that the calls of one rotation read at least: several times any cache
PREFILL_CALLS = 2
TOLERANCE = 0.02  # root mean square of the error over that of the output; bfloat16 alone gives 0.005


@dataclass(frozen=True)
class Case:
    """One pool and how many tokens a call has.

    Args:
        geometry: name in ``GEOMETRIES``.
        kind: page format.
        tokens: T.
    """

    geometry: str
    kind: str
    tokens: int

    def __str__(self):
        return f"{self.geometry}-{self.kind}-T{self.tokens}"


class Workload:
    """One case's data, on one device.

    Args:
        case: what to make.
        device: where.

    Attributes:
        page_format: of the pages.
        pages: ``[S, page_bytes]`` uint8; several layers' worth of experts for one token, one layer's for many.
        weights: the pages' tensors by name, ``[S, ...]``.
        calls: (x ``[T, H]``, slots ``[T, K]`` int64, gates ``[T, K]`` float32) of each call. Calls of one token share
            no slot.
        dtype: of x.
    """

    dtype = torch.bfloat16

    def __init__(self, case: Case, device: torch.device):
        geometry = GEOMETRIES[case.geometry]
        self.case, self.geometry = case, geometry
        self.page_format = geometry.page_format(case.kind)
        k = geometry.top_k
        calls = max(2, ceil(WORKING_SET / (k * self.page_format.page_bytes))) if case.tokens == 1 else PREFILL_CALLS
        slots = calls * k if case.tokens == 1 else geometry.experts
        self.pages = torch.empty(slots, self.page_format.page_bytes, dtype=torch.uint8, device=device)
        self.weights = self.page_format.views(self.pages)
        generator = torch.Generator(device).manual_seed(0)
        fill(self.weights, self.page_format, generator)
        chosen = (
            torch.randperm(slots, generator=generator, device=device).view(calls, 1, k) if case.tokens == 1 else None
        )
        self.calls = []
        for call in range(calls):
            x = torch.randn(case.tokens, geometry.hidden, generator=generator, device=device).to(self.dtype)
            logits = torch.randn(case.tokens, slots, generator=generator, device=device)
            gates, ids = logits.softmax(-1).topk(k)
            self.calls.append((x, ids if chosen is None else chosen[call], gates))

    def bytes(self) -> int:
        """Of weights that a call reads, on average: every expert that a token of the call chose, once."""
        return (
            sum(slots.unique().numel() for _, slots, _ in self.calls) * self.page_format.weight_bytes // len(self.calls)
        )

    def flops(self) -> int:
        """Of a call's matmuls, two for each multiplication."""
        tokens, k = self.calls[0][1].shape
        return 2 * tokens * k * 3 * self.geometry.hidden * self.geometry.intermediate


def fill(weights: dict[str, torch.Tensor], page_format: PageFormat, generator: torch.Generator) -> None:
    """Random weights that keep activations near 1: one page of noise, turned further from page to page.

    Drawing every page anew would take minutes on a CPU.
    """
    device = generator.device
    for name, tensor in weights.items():
        shape, dtype = tensor.shape[1:], tensor.dtype
        columns = weights[name.removesuffix("_scales").removesuffix("_bias")].shape[-1]
        if name.endswith("_scales"):
            bits = page_format.bits
            scale = ((4**bits - 1) / 12 * columns * 8 / bits) ** -0.5  # of integers that are as likely each
            if page_format.group:  # a scale and a zero
                tensor[..., 0], tensor[..., 1] = scale, scale / 2
            else:
                tensor.fill_(scale)
            continue
        if dtype.is_floating_point:
            spread = 0.1 if name.endswith("_bias") else columns**-0.5
            noise = (torch.randn(shape, generator=generator, device=device) * spread).to(dtype).flatten()
        else:
            low, high = (-127, 128) if dtype == torch.int8 else (0, 256)
            noise = torch.randint(low, high, shape, generator=generator, device=device, dtype=dtype).flatten()
        for slot in range(len(tensor)):
            tensor[slot] = noise.roll(slot * 7919).view(shape)


def check(y: torch.Tensor, expected: torch.Tensor) -> None:
    """Whether an output, on whatever device, is what it should be.

    Raises:
        AssertionError: if not.
    """
    expected = expected.float()
    error = (y.to(expected.device).float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < TOLERANCE, f"relative error {error:.3f}"
