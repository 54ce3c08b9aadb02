"""A checkpoint's safetensors files: every tensor by name, and a tensor or a part of one at a time."""

import os
from pathlib import Path

import torch

from cachemoe.offload.errors import InputError
from cachemoe.offload.header import TensorEntry, read_header, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Shards:
    """Every tensor of a checkpoint folder by name; nothing but headers is read before it is asked for.

    Args:
        folder: with ``model.safetensors``, or an index and the files that it names. Of both the single file is read and
            the index is not, as transformers does: an older model's index may have stayed behind.

    Attributes:
        entries: name -> ``TensorEntry``, in the order of files and headers. Where an index is read, it decides: which
            file has a tensor, and that what it does not name is none of the model's.
        stamps: ``file_stamp`` of each file, taken before it was read, and of the index and the single file also where
            there is none: one that appears would be read instead.

    Raises:
        InputError: if a file is missing, cut short or damaged.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.stamps = [file_stamp(folder, file) for file in (INDEX, SINGLE)]
        self._where = _index(folder)
        files = [SINGLE] if self._where is None else sorted(set(self._where.values()))
        self.entries: dict[str, TensorEntry] = {}
        for file in files:
            self.stamps.append(file_stamp(folder, file))
            for name, entry in _header(folder / file).items():
                if self._where is None or self._where.get(name) == file:
                    self.entries[name] = entry

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def read(self, name: str, *index: int) -> torch.Tensor:
        """A tensor, or what stands at an index into its first dimensions, in memory of its own.

        Raises:
            InputError: if there is no such tensor, nothing at the index, or its file ends early.
        """
        if name not in self.entries:
            if self._where is not None and name in self._where:
                raise InputError(f"{self._folder / INDEX} says that {name} is in {self._where[name]}, which lacks it")
            raise InputError(f"{self._folder} has no tensor {name}")
        try:
            return self.entries[name].read(*index)
        except IndexError as error:
            raise InputError(f"{self._folder} has too small a {name}: {error}") from error
        except EOFError as error:
            raise InputError(f"{error}: get the checkpoint again") from error
        except OSError as error:
            raise InputError(f"{self.entries[name].file} cannot be read: {error.strerror or error}") from error


def file_stamp(folder: Path, name: str) -> tuple[str, int, int, int, int]:
    """What changes when a file does: its name, size, times of modification and change in ns, and inode; -1 without one.

    The time of change cannot be set, unlike that of modification, so that a write in place is seen whatever it hides;
    one through a memory map need not be.
    """
    try:
        stat = os.stat(folder / name)
    except OSError:
        return name, -1, -1, -1, -1
    return name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file, relative to the folder, of a checkpoint in several files; None of one in a single file."""
    path = folder / INDEX
    if (folder / SINGLE).exists():
        return None
    if not path.exists():
        if others := sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*")):
            raise InputError(
                f"{folder} has its weights as {others[0].name}, which is pickle and can run code: cachemoe reads "
                "safetensors alone, so get or save the checkpoint in that format"
            )
        return None
    try:
        index = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise InputError(f"{path} does not say which file has which tensor")
    for file in set(where.values()):
        if not file or os.path.isabs(file) or ".." in Path(file).parts or not file.isprintable():
            raise InputError(f"{path} names {file[:100]!r}, which is not in its folder")
    return where


def _header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one file."""
    try:
        return read_header(file)[1]
    except FileNotFoundError as error:
        raise InputError(f"{file} is missing: get the checkpoint again") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read, cut short or damaged perhaps: {error}") from error
