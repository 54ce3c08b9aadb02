"""Routing traces: the router logits of real text, so that policies can be studied without the model.

One safetensors file: ``logits`` ``[L, T, E]`` float16, what each MoE layer's router gave each token; ``ids``
``[L, T, K]`` int16, what the model chose; ``tokens`` ``[T]`` int32, the text; and in the metadata ``model`` (the
checkpoint's fingerprint), ``name``, ``context`` (tokens after which attention starts afresh) and ``version``.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cachemoe.offload.errors import InputError
from cachemoe.offload.files import whole_file
from cachemoe.offload.header import parse_json

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
        tensors = {name: getattr(self, name).contiguous() for name in DTYPES}
        with whole_file(path) as partial:
            partial.write_bytes(save(tensors, metadata={"cachemoe-trace": json.dumps(about)}))

    @classmethod
    def load(cls, path: Path) -> "RoutingTrace":
        """Read a trace.

        Raises:
            InputError: if it is none, or damaged.
        """
        if not path.is_file():
            raise InputError(f"there is no trace at {path}: `cachemoe trace` makes one")
        try:
            with safe_open(path, framework="pt") as file:
                fields = parse_json((file.metadata() or {})["cachemoe-trace"].encode())
                tensors = {name: file.get_tensor(name) for name in DTYPES}
            version, about = fields["version"], {name: fields[name] for name in KINDS}
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"{path} is not a cachemoe trace, or damaged: make it again") from error
        if version != TRACE_VERSION:
            raise InputError(f"{path} is a trace of another version: make it again")
        if any(type(about[name]) is not kind for name, kind in KINDS.items()):
            raise InputError(f"{path} is not a cachemoe trace, or damaged: make it again")
        if any(tensors[name].dtype != dtype for name, dtype in DTYPES.items()):
            raise InputError(f"{path} has parts of another dtype than a trace has: make it again")
        logits, ids, tokens = (tuple(tensors[name].shape) for name in DTYPES)
        if not logits[:2] == ids[:2] == (*logits[:1], *tokens) or len(logits) != 3 or len(ids) != 3:
            raise InputError(f"{path} has parts that do not fit each other: make it again")
        chosen = tensors["ids"]
        if about["context"] < 1 or (chosen.numel() and not 0 <= chosen.min() <= chosen.max() < logits[2]):
            raise InputError(f"{path} has a context or an expert's number that cannot be: make it again")
        return cls(**tensors, **about)
