"""One token through a decoder layer on the CPU, in C: attention, router, routing, and experts that the pool has.

A layer is then one call. Between two matrices that stream from memory the caches are cold, and the calls of Python and
torch around its parts would take a quarter of the layer's time.
"""

import ctypes
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch

from cachemoe.kernels import attention_cpu, quantized_cpu, route_c
from cachemoe.kernels.attention_cpu import Attention
from cachemoe.kernels.compile_c import compile_c, why_not
from cachemoe.kernels.formats import PageFormat
from cachemoe.kernels.policy import Policy
from cachemoe.kernels.quantized_cpu import DTYPES
from cachemoe.kernels.state import GateScores, Residency, Routing

_SOURCE = Path(__file__).with_suffix(".c")
_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
SCORES = "softmax", "sigmoid"  # functions that the C knows


@dataclass(frozen=True, eq=False)
class Router:
    """A router whose logits are a product with its weight, and how experts are chosen by them.

    Args:
        weight, bias: ``[E, H]`` and ``[E]`` or None; read at each call.
        logits, weights: dtypes that the model's own router gives these in.
        policy, evict, top_k, scores, correction: as for ``route``.
        places: whether the state changes as by ``place``, for a model that chooses itself.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    logits: torch.dtype
    weights: torch.dtype
    policy: Policy
    evict: Callable
    top_k: int
    scores: GateScores
    correction: torch.Tensor | None
    places: bool

    @property
    def fits(self) -> bool:
        """Whether the C routes so."""
        tensors = [each for each in (self.weight, self.bias) if each is not None]
        dtypes = {self.logits, self.weights, self.weight.dtype} <= set(DTYPES)
        laid_out = all(each.is_contiguous() and each.dtype == self.weight.dtype for each in tensors)
        return dtypes and laid_out and self.scores.function in SCORES and self.rule is not None

    @property
    def rule(self) -> ctypes.Structure | None:
        """As ``route_c.rule_of``."""
        how = self.policy, self.evict, len(self.weight), self.top_k, self.scores, self.correction
        return route_c.rule_of(*how, by_weight=self.places)


@dataclass(frozen=True, eq=False)
class Layer:
    """A decoder layer whose experts are in a pool. Needs ``has_c()``.

    Args:
        attention: and the norms around it.
        router: that ``fits``.
        state: ``[1, ...]`` of one plain cache.
        held, frame_of: int64, of each slot the expert that is in it, complete, and its frame.
        weights: the frames' tensors ``[F, ...]``, of int8, int4 or int2 pages.
        page_format: of them.
    """

    attention: Attention
    router: Router
    state: Residency
    held: array
    frame_of: array
    weights: dict[str, torch.Tensor]
    page_format: PageFormat

    @cached_property
    def routing(self) -> Routing:
        """Of the last token; each overwrites the one before."""
        return Routing.empty(1, 1, self.router.top_k)

    def step(
        self,
        x: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        length: int,
    ) -> tuple[int, torch.Tensor, torch.Tensor, float, float]:
        """One token.

        Args:
            x, cosine, sine, keys, values, length: as ``Attention.step``.

        Returns:
            1, the hidden state after the layer ``[1, 1, H]``, a tensor without meaning, and the seconds of routing and
            of experts. Or 0 where some experts are not in their slots, and what ``Attention.step`` gives: the token
            is routed. Or -1 where a logit is not finite, and the same: nothing is routed.
        """
        k, hidden = self.router.top_k, x.shape[-1]
        sizes = self.attention.scratch_bytes(length), quantized_cpu.token_scratch_bytes(self._pages, k)
        scratch = torch.empty(max(sizes) + 4 * (k + 1) * hidden, dtype=torch.uint8, device="cpu")
        out, normal, seconds = torch.empty_like(x), torch.empty_like(x), (ctypes.c_double * 2)()
        y = scratch.data_ptr() + max(sizes)
        how = library().layer_step(
            *(self._structure, x.data_ptr(), cosine.data_ptr(), sine.data_ptr(), cosine.shape[-1]),
            *(keys.data_ptr(), values.data_ptr(), keys.stride(1), length),
            *(scratch.data_ptr(), y, y + 4 * k * hidden, out.data_ptr(), normal.data_ptr(), seconds),
        )
        return how, out, normal, *seconds

    @cached_property
    def _pages(self) -> ctypes.Structure:
        return quantized_cpu.pages_of(self.weights, self.page_format)

    @cached_property
    def _structure(self) -> "_Layer":
        router, routing, dtype = self.router, self.routing, self.attention.dtype
        functions = attention_cpu.library().attend, route_c.library().route, quantized_cpu.library().token
        parts = self.attention.structure, router.rule, route_c.cache_of(self.state), self._pages
        misses = routing.misses.pages, routing.misses.slots, routing.misses.count
        results = routing.ids, routing.slots, *misses, routing.weights, routing.hits
        made = _Layer(
            *(ctypes.cast(each, _POINTER).value for each in functions),
            *map(ctypes.addressof, parts),
            *(None if each is None else each.data_ptr() for each in (router.weight, router.bias)),
            *(each.buffer_info()[0] for each in (self.held, self.frame_of)),
            *(each.data_ptr() for each in results),
            *(each.data_ptr() if router.places else None for each in (self.state.tokens, self.state.range_sum)),
            *(*router.weight.shape, router.top_k),
            *(each == torch.bfloat16 for each in (dtype, router.weight.dtype, router.logits, router.weights)),
            router.scores.function == "sigmoid",
        )
        made.kept = parts  # whose memory it points to
        return made


@cache
def has_c() -> bool:
    """Whether the C could be compiled."""
    return why_not(library) is None and attention_cpu.has_c() and quantized_cpu.has_c() and route_c.has_c()


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("attend", "route", "token", "attention", "rule", "cache", "pages")),
        *((name, _POINTER) for name in ("weight", "bias", "held", "frame_of")),
        *((name, _POINTER) for name in ("ids", "slots", "missed", "taken", "count", "weights", "hits")),
        *((name, _POINTER) for name in ("tokens", "range_sum")),
        *((name, _LONG) for name in ("experts", "hidden", "k")),
        *((name, _INT) for name in ("bf16", "router_bf16", "rounds_logits", "rounds_weights", "sigmoid")),
    )


@cache
def library() -> ctypes.CDLL:
    compiled = compile_c(_SOURCE)
    pointers = ctypes.POINTER(_Layer), *(_POINTER,) * 3, _INT, *(_POINTER,) * 2, _LONG, _LONG, *(_POINTER,) * 5
    compiled.layer_step.argtypes = *pointers, ctypes.POINTER(ctypes.c_double)
    compiled.layer_step.restype = _INT
    return compiled
