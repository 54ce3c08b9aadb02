"""Fingerprints of experts' weights: every byte counts, and one is known as long as the checkpoint's files stay.

Reading a checkpoint to know it again would take as long as packing it. So the fingerprint is kept in the cache
directory beside the stamp of the checkpoint's files, their sizes, times and inodes; where the stamp differs, the
weights are read.
"""

import hashlib
import json
import os
from contextlib import suppress

import torch
from xxhash import xxh3_128

from cachemoe.kernels.cache_folder import cache_directory
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.progress import Progress
from cachemoe.offload.errors import InputError
from cachemoe.offload.files import whole_file

SETTLED_NS = 2_000_000_000  # files changed less than that before they were looked at may change within the same stamp


class Fingerprint:
    """The fingerprint of a model's experts, made from one expert after the other, in the order of a store's pages."""

    def __init__(self, source):
        """Begin.

        Args:
            source: a ``Checkpoint`` or ``ModelExperts``.
        """
        shape = source.shape
        form = len(shape.layers), shape.experts, shape.hidden, shape.intermediate, source.dtype
        self._hash = xxh3_128(repr(form).encode())

    def add(self, weights: dict[str, torch.Tensor]) -> None:
        """The next expert.

        Args:
            weights: as ``Checkpoint.expert`` gives them.
        """
        for weight in weights.values():
            self._hash.update(weight.contiguous().view(torch.uint8).numpy())

    def __str__(self) -> str:
        """32 hexadecimal digits: of the experts so far."""
        return self._hash.hexdigest()


def fingerprint(checkpoint: Checkpoint, progress: Progress) -> str:
    """The checkpoint's fingerprint, as it was kept, or from its weights.

    Args:
        progress: shows the reading.

    Raises:
        InputError: if the weights have to be read and cannot be, or change meanwhile.
    """
    if (kept := _kept(checkpoint)) is not None:
        return kept
    layers, experts = len(checkpoint.shape.layers), checkpoint.shape.experts
    made = Fingerprint(checkpoint)
    with progress(f"reading {layers * experts} experts, to know the checkpoint", layers * experts) as advance:
        for layer in range(layers):
            for e in range(experts):
                made.add(checkpoint.expert(layer, e))
                advance()
    keep(checkpoint, str(made))
    return str(made)


def keep(checkpoint: Checkpoint, text: str) -> None:
    """Keep a checkpoint's fingerprint, where the cache directory can be written.

    Raises:
        InputError: if the checkpoint's files have changed since it was opened: what was read may be of both.
    """
    checkpoint.check_unchanged()
    if max(time_ns for _, _, *times, _ in checkpoint.stamp for time_ns in times) > checkpoint.opened_ns - SETTLED_NS:
        return
    with suppress(InputError, OSError), whole_file(_place(checkpoint)) as partial:
        partial.write_text(json.dumps({"stamp": checkpoint.stamp, "fingerprint": text}))


def forget(checkpoint: Checkpoint) -> None:
    """Remove what is kept of a checkpoint that is to go."""
    with suppress(OSError):
        _place(checkpoint).unlink()


def _kept(checkpoint: Checkpoint) -> str | None:
    try:
        record = json.loads(_place(checkpoint).read_text())
        return record["fingerprint"] if record["stamp"] == [list(file) for file in checkpoint.stamp] else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or one that is damaged
        return None


def checkpoint_key(checkpoint: Checkpoint) -> str:
    """16 hexadecimal digits that tell a checkpoint's folder from others of the same name."""
    return hashlib.sha256(os.fsencode(checkpoint.path.resolve())).hexdigest()[:16]


def _place(checkpoint: Checkpoint):
    return cache_directory() / "fingerprints" / checkpoint_key(checkpoint)
