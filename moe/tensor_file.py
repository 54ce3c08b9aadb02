"""Tensors beside a few facts in one safetensors file, whole or not there: what a trace and a calibration are."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cachemoe.offload.errors import InputError
from cachemoe.offload.files import whole_file
from cachemoe.offload.header import parse_json


def save_tensors(path: Path, what: str, about: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Write the file; it appears under its name only when complete.

    Args:
        what: the file is, such as ``trace``.
        about: facts, ``version`` among them.

    Raises:
        OSError: if it cannot be written.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as partial:
        partial.write_bytes(save(contiguous, metadata={f"cachemoe-{what}": json.dumps(about)}))


def load_tensors(
    path: Path, what: str, version: int, kinds: dict[str, type], names: list[str]
) -> tuple[dict[str, torch.Tensor], dict]:
    """Read the file: the tensors, and the facts but for the version.

    Args:
        what: the file is to be.
        kinds: type of each fact.
        names: of the tensors.

    Raises:
        InputError: if it is none, damaged, or of another version.
    """
    broken = InputError(f"{path} is not a cachemoe {what}, or damaged: make it again")
    try:
        with safe_open(path, framework="pt") as file:
            fields = parse_json((file.metadata() or {})[f"cachemoe-{what}"].encode())
            tensors = {name: file.get_tensor(name) for name in names}
        found, about = fields["version"], {name: fields[name] for name in kinds}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise broken from error
    if found != version:
        raise InputError(f"{path} is a {what} of another version: make it again")
    if any(type(about[name]) is not kind for name, kind in kinds.items()):
        raise broken
    return tensors, about
