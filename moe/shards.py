"""A checkpoint's safetensors files, read by their headers, a tensor or a row of one at a time.

``safe_open`` maps whole files, which a limit on memory counts; here a read touches its own bytes and no others.
"""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cachemoe.offload.errors import InputError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LONGEST_HEADER = 100_000_000  # bytes, as safetensors itself allows


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its file, first byte, dtype and shape."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Shards:
    """Every tensor of a checkpoint folder by name; nothing but headers is read before it is asked for.

    Args:
        folder: with ``model.safetensors``, or an index and the files that it names.

    Attributes:
        entries: name -> ``TensorEntry``, in the order of files and headers.

    Raises:
        InputError: if a file is missing, cut short or damaged, or an index names a tensor that its file lacks.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        where = _index(folder)
        self.entries: dict[str, TensorEntry] = {}
        for file in sorted(set(where.values())) if where else [SINGLE]:
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
        entry = self.entries[name]
        shape, start, size = entry.shape, entry.start, entry.bytes
        for i in index:
            size //= shape[0]
            shape, start = shape[1:], start + i * size
        data = torch.empty(size, dtype=torch.uint8)
        buffer = memoryview(data.numpy())
        with open(entry.file, "rb", buffering=0) as file:
            file.seek(start)
            while buffer:
                count = file.readinto(buffer)
                if not count:
                    raise InputError(f"{entry.file} ends before {name} does: get the checkpoint again")
                buffer = buffer[count:]
        return data.view(entry.dtype).view(shape)


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


def _header(file: Path) -> Iterator[tuple[str, TensorEntry]]:
    """The tensors of one file."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > min(LONGEST_HEADER, size - 8):
                raise ValueError("its header is longer than the file")
            header = json.loads(opened.read(length))
        for name, fields in header.items():
            if name == "__metadata__":
                continue
            first, end = fields["data_offsets"]
            shape, start = tuple(fields["shape"]), 8 + length + first
            if not all(type(number) is int and number >= 0 for number in (first, end, *shape)):
                raise ValueError(f"{name} has a place that cannot be")
            entry = TensorEntry(file, start, DTYPES[fields["dtype"]], shape)
            if end - first != entry.bytes or 8 + length + end > size:
                raise ValueError(f"{name} does not fit into it")
            yield name, entry
    except FileNotFoundError as error:
        raise InputError(f"{file} is missing: get the checkpoint again") from error
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is cut short or damaged ({error}): get the checkpoint again") from error
