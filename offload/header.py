"""Headers of safetensors files, and their tensors one at a time.

``safe_open`` maps whole files, which a limit on address space counts; here a read touches its own bytes and no others.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

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
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
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

    def read(self, *index: int) -> torch.Tensor:
        """The tensor, or what stands at an index into its first dimensions, in memory of its own.

        Raises:
            EOFError: if the file ends early.
        """
        shape, start, size = self.shape, self.start, self.bytes
        for i in index:
            size //= shape[0]
            shape, start = shape[1:], start + i * size
        data = torch.empty(size, dtype=torch.uint8)
        buffer = memoryview(data.numpy())
        with open(self.file, "rb", buffering=0) as file:
            file.seek(start)
            while buffer:
                count = file.readinto(buffer)
                if not count:
                    raise EOFError(f"{self.file} ends early")
                buffer = buffer[count:]
        return data.view(self.dtype).view(shape)


def read_header(file: Path) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    """The metadata of a file, and its tensors by name.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no safetensors file, or cut short.
    """
    size = file.stat().st_size
    with open(file, "rb") as opened:
        start = opened.read(8)
        if len(start) < 8:
            raise ValueError("it has no header")
        (length,) = struct.unpack("<Q", start)
        if length > min(LONGEST_HEADER, size - 8):
            raise ValueError("its header is longer than the file")
        header = json.loads(opened.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    entries = {}
    metadata = header.pop("__metadata__", None) or {}
    for name, fields in header.items():
        try:
            (first, end), shape = fields["data_offsets"], tuple(fields["shape"])
            if not all(type(number) is int and number >= 0 for number in (first, end, *shape)):
                raise ValueError(f"{name} has a place that cannot be")
            entries[name] = entry = TensorEntry(file, 8 + length + first, DTYPES[fields["dtype"]], shape)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{name} has a dtype that cachemoe does not know, or no place: {error}") from error
        if end - first != entry.bytes or 8 + length + end > size:
            raise ValueError(f"{name} does not fit into it")
    if 8 + length + sum(entry.bytes for entry in entries.values()) != size:
        raise ValueError("it is longer than its tensors")
    return metadata, entries
