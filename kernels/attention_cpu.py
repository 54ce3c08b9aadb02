"""One token through a layer's attention on the CPU, in C: in one call, where torch takes a hundred small ones.

Between two matrices that stream from memory the caches are cold, and each of torch's operators takes many microseconds,
whatever its size.
"""

import ctypes
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch

from cachemoe.kernels.compile_c import compile_c, why_not
from cachemoe.kernels.quantized_cpu import Matrix, matrix_of
from cachemoe.kernels.rounded_cpu import Rounded

_SOURCE = Path(__file__).with_suffix(".c")
_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
LARGEST_HEAD, MOST_SHARING = 512, 64  # numbers of a head, and heads that share a key


@dataclass(frozen=True, eq=False)
class Norm:
    """A root-mean-square norm.

    Args:
        weight: in the model's dtype, contiguous; read at each call.
    """

    weight: torch.Tensor
    epsilon: float


@dataclass(frozen=True, eq=False)
class Attention:
    """A layer's attention and the norms around it: queries and keys are normalised, if they are, and turned by halves.

    Args:
        q, k, v, o: the matrices, q, k and v of one format, each with its bias ``[rows]`` in the model's dtype or None.
        before, after: norms of the hidden state and of its sum with the attention's output.
        of_q, of_k: norms of queries and keys, of each head ``[D]`` or of all heads together; or None.
        heads, kv_heads: of queries, and of keys and values.
        scaling: of the scores.
        dtype: bfloat16 or float32, of hidden states and of the cache.
    """

    q: tuple[Rounded, torch.Tensor | None]
    k: tuple[Rounded, torch.Tensor | None]
    v: tuple[Rounded, torch.Tensor | None]
    o: tuple[Rounded, torch.Tensor | None]
    before: Norm
    after: Norm
    of_q: Norm | None
    of_k: Norm | None
    heads: int
    kv_heads: int
    scaling: float
    dtype: torch.dtype

    @cached_property
    def head(self) -> int:
        """D."""
        return len(self.q[0].packed) // self.heads

    @property
    def fits(self) -> bool:
        """Whether the C takes such sizes."""
        (q, _), (k, _), (v, _), (o, _) = self.q, self.k, self.v, self.o
        heads = 0 < self.kv_heads <= self.heads <= MOST_SHARING * self.kv_heads and self.heads % self.kv_heads == 0
        rows = self.heads * self.head, *[self.kv_heads * self.head] * 2, q.columns
        sizes = rows == tuple(len(each.packed) for each in (q, k, v, o)) and o.columns == rows[0]
        formats = {(each.bits, each.group) for each in (q, k, v)} == {(q.bits, q.group)} and o.bits == q.bits
        return heads and sizes and formats and self.head <= LARGEST_HEAD

    def step(
        self,
        x: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        length: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One token's hidden state after the attention, and that normalised.

        Args:
            x: ``[1, 1, H]`` contiguous.
            cosine, sine: ``[1, 1, R]`` contiguous, of the first R numbers of a head.
            keys, values: ``[1, kv_heads, C, D]`` contiguous, of C tokens at most; the token's are written.
            length: tokens in them before this one.
        """
        scratch = torch.empty(self.scratch_bytes(length), dtype=torch.uint8, device="cpu")
        out, normal = torch.empty_like(x), torch.empty_like(x)
        library().attend(
            *(self.structure, x.data_ptr(), cosine.data_ptr(), sine.data_ptr(), cosine.shape[-1]),
            *(keys.data_ptr(), values.data_ptr(), keys.stride(1), length),
            *(scratch.data_ptr(), out.data_ptr(), normal.data_ptr()),
        )
        return out, normal

    def scratch_bytes(self, length: int) -> int:
        """What ``attend`` needs beside, after so many tokens."""
        return library().attention_scratch_bytes(self.structure, length)

    @cached_property
    def structure(self) -> "_Attention":
        """What the C has to know."""
        norms = [
            _Norm(None, 0) if norm is None else _Norm(norm.weight.data_ptr(), norm.epsilon)
            for norm in (self.before, self.after, self.of_q, self.of_k)
        ]
        all_heads = self.of_q is not None and len(self.of_q.weight) != self.head
        sizes = self.heads, self.kv_heads, self.head, all_heads, self.scaling
        (q, _), (o, _) = self.q, self.o
        how = q.bits, q.group, o.group, self.dtype == torch.bfloat16
        matrices = (matrix_of(m.packed, m.scales, m.bits, bias) for m, bias in (self.q, self.k, self.v, self.o))
        return _Attention(*matrices, *norms, *how, *sizes)


@cache
def has_c() -> bool:
    """Whether the C could be compiled."""
    return why_not(library) is None


class _Norm(ctypes.Structure):
    _fields_ = (("weight", _POINTER), ("epsilon", ctypes.c_float))


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, Matrix) for name in "qkvo"),
        *((name, _Norm) for name in ("before", "after", "of_q", "of_k")),
        *((name, _INT) for name in ("bits", "group", "o_group", "bf16", "heads", "kv_heads", "head", "all_heads")),
        ("scaling", ctypes.c_float),
    )


@cache
def library() -> ctypes.CDLL:
    compiled = compile_c(_SOURCE)
    attention = ctypes.POINTER(_Attention)
    compiled.attend.argtypes = attention, *(_POINTER,) * 3, _INT, *(_POINTER,) * 2, _LONG, _LONG, *(_POINTER,) * 3
    compiled.attend.restype = None
    compiled.attention_scratch_bytes.argtypes, compiled.attention_scratch_bytes.restype = (attention, _LONG), _LONG
    return compiled
