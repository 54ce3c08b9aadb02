"""A checkpoint's safetensors files: every tensor by name, and a tensor or a part of one at a time."""

import json
import os
from pathlib import Path

import torch

from cachemoe.offload.errors import InputError
from cachemoe.offload.header import TensorEntry, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Shards:
    """Every tensor of a checkpoint folder by name; nothing but headers is read before it is asked for.

    Args:
        folder: with ``model.safetensors``, or an index and the files that it names.

    Attributes:
        entries: name -> ``TensorEntry``, in the order of files and headers.
        stamps: ``file_stamp`` of each file, taken before its header was read.

    Raises:
        InputError: if a file is missing, cut short or damaged, or an index names a tensor that its file lacks.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        where = _index(folder)
        self.entries: dict[str, TensorEntry] = {}
        self.stamps: list[tuple] = []
        for file in sorted(set(where.values())) if where else [SINGLE]:
            self.stamps.append(file_stamp(folder, file))
            self.entries.update(_header(folder / file))
        for name, file in (where or {}).items():
            if name not in self.entries or self.entries[name].file.name != file:
                raise InputError(f"{folder / INDEX} names {name}, which {file} lacks: get the checkpoint again")

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def read(self, name: str, *index: int) -> torch.Tensor:
        """A tensor, or what stands at an index into its first dimensions, in memory of its own.

        Raises:
            InputError: if there is no such tensor, or its file ends early.
        """
        if name not in self.entries:
            raise InputError(f"{self._folder} has no tensor {name}: get the checkpoint again")
        try:
            return self.entries[name].read(*index)
        except EOFError as error:
            raise InputError(f"{error}: get the checkpoint again") from error


def file_stamp(folder: Path, name: str) -> tuple[str, int, int, int, int]:
    """What changes when a file does: its name, size, times of modification and change in ns, and inode; -1 without one.

    The time of change cannot be set, unlike that of modification, so that an edit in place is seen whatever it hides.
    """
    try:
        stat = os.stat(folder / name)
    except OSError:
        return name, -1, -1, -1, -1
    return name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name of a checkpoint in several files; None of one in a single file."""
    path = folder / INDEX
    if not path.exists():
        if not (folder / SINGLE).exists() and (others := sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))):
            raise InputError(
                f"{folder} has its weights as {others[0].name}, which is pickle and can run code: cachemoe reads "
                "safetensors alone, so get or save the checkpoint in that format"
            )
        return None
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        # Only the last part of a name: an index cannot point outside its folder.
        return {name: Path(file).name for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: get the checkpoint again") from error


def _header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one file."""
    try:
        return read_header(file)[1]
    except FileNotFoundError as error:
        raise InputError(f"{file} is missing: get the checkpoint again") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read, cut short or damaged perhaps: {error}") from error
