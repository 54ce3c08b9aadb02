"""Routing traces: the router logits of real text, so that policies can be studied without the model.

One safetensors file: ``logits`` ``[L, T, E]`` float16, what each MoE layer's router gave each token; ``ids``
``[L, T, K]`` int16, what the model chose; ``tokens`` ``[T]`` int32, the text; and in the metadata ``model`` (the
checkpoint's fingerprint), ``name``, ``context`` (tokens after which attention starts afresh) and ``version``.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from cachemoe.moe.tensor_file import load_tensors, save_tensors
from cachemoe.offload.errors import InputError

TRACE_VERSION = 1
DTYPES = {"logits": torch.float16, "ids": torch.int16, "tokens": torch.int32}
KINDS = {"model": str, "name": str, "context": int}  # of what the metadata says beside the version


@dataclass(frozen=True)
class RoutingTrace:
    """A model's routing of a text.

    Args:
        logits: ``[L, T, E]`` float16.
        ids: ``[L, T, K]`` int16.
        tokens: ``[T]`` int32.
        model: fingerprint of the checkpoint.
        name: of the checkpoint.
        context: tokens of a window; attention saw no further back.
    """

    logits: torch.Tensor
    ids: torch.Tensor
    tokens: torch.Tensor
    model: str
    name: str
    context: int

    def save(self, path: Path) -> None:
        """Write the trace; it appears under its name only when complete.

        Raises:
            OSError: if it cannot be written.
        """
        about = {"version": TRACE_VERSION, "model": self.model, "name": self.name, "context": self.context}
        save_tensors(path, "trace", about, {name: getattr(self, name) for name in DTYPES})

    @classmethod
    def load(cls, path: Path) -> "RoutingTrace":
        """Read a trace.

        Raises:
            InputError: if it is none, or damaged.
        """
        if not path.is_file():
            raise InputError(f"there is no trace at {path}: `cachemoe trace` makes one")
        tensors, about = load_tensors(path, "trace", TRACE_VERSION, KINDS, list(DTYPES))
        if any(tensors[name].dtype != dtype for name, dtype in DTYPES.items()):
            raise InputError(f"{path} has parts of another dtype than a trace has: make it again")
        logits, ids, tokens = (tuple(tensors[name].shape) for name in DTYPES)
        if not logits[:2] == ids[:2] == (*logits[:1], *tokens) or len(logits) != 3 or len(ids) != 3:
            raise InputError(f"{path} has parts that do not fit each other: make it again")
        chosen = tensors["ids"]
        if about["context"] < 1 or (chosen.numel() and not 0 <= chosen.min() <= chosen.max() < logits[2]):
            raise InputError(f"{path} has a context or an expert's number that cannot be: make it again")
        return cls(**tensors, **about)
