"""Headers of safetensors files, and their tensors one at a time.

``safe_open`` maps whole files, which a limit on address space counts; here a read touches its own bytes and no others.
"""

import json
import math
import os
import stat
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
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}
LONGEST_HEADER = 100_000_000  # bytes, as safetensors itself allows
MOST_DIMENSIONS = 64  # torch's
LONGEST_SHOWN = 100  # characters of a tensor's name in a sentence
LONGEST_JSON = 50_000_000  # bytes of a configuration or an index


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
            IndexError: if there is nothing at the index.
            EOFError: if the file ends early.
        """
        shape, start, size = self.shape, self.start, self.bytes
        for i in index:
            if not shape or not 0 <= i < shape[0]:
                raise IndexError(f"a tensor of {self.shape} has nothing at {index}")
            size //= shape[0]
            shape, start = shape[1:], start + i * size
        data = torch.empty(size, dtype=torch.uint8, device="cpu")
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
        ValueError: if it is no safetensors file, or cut short; as safetensors itself demands, its tensors fill it one
            after the other, without overlap or hole.
    """
    with _open(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        start = opened.read(8)
        if len(start) < 8:
            raise ValueError("it has no header")
        (length,) = struct.unpack("<Q", start)
        if length > min(LONGEST_HEADER, size - 8):
            raise ValueError("its header is longer than the file")
        header = parse_json(opened.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is no object of texts")
    data = 8 + length
    entries = {name: _entry(file, data, name, fields) for name, fields in header.items()}
    end = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].bytes)):
        if entry.start != end:
            raise ValueError(f"{shown(name)} does not begin where the tensor before it ends")
        end += entry.bytes
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, and it at {size}")
    return metadata, entries


def read_json(file: Path):
    """What a JSON file that came from outside says.

    Raises:
        OSError: if it cannot be read.
        ValueError: as ``parse_json``, or if it is no regular file, or larger than any that a model has.
    """
    with _open(file) as opened:
        if (size := os.fstat(opened.fileno()).st_size) > LONGEST_JSON:
            raise ValueError(f"it has {size} bytes, and no more than {LONGEST_JSON} are read")
        return parse_json(opened.read())


def _open(file: Path):
    """A regular file, for reading: a pipe would be waited for, and a device may never end."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("it is no regular file")
    return open(file, "rb")


def parse_json(text: bytes):
    """JSON that came from outside.

    Raises:
        ValueError: if it is none, nested too deeply, or has a name twice: which of the two is meant nobody can know.
    """

    def once(pairs: list[tuple]) -> dict:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands twice in it")
        return found

    try:
        value = json.loads(text.decode(), object_pairs_hook=once)
        if b"\\ud" in text.lower():  # half of a character, which no file's name can hold and no terminal show
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def shown(name: str) -> str:
    """A tensor's name, short enough for a sentence, and without what a terminal would obey."""
    short = name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}..."
    return short if short.isprintable() else ascii(short)


def _entry(file: Path, data: int, name: str, fields) -> TensorEntry:
    """One tensor's entry in a header; ``data`` is the first byte after it."""
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown(name)} has not dtype, shape and place")
    dtype, shape, place = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{shown(name)} has a dtype that cachemoe does not know, {str(dtype)[:20]}")
    if not all(isinstance(each, list) and all(type(n) is int and n >= 0 for n in each) for each in (shape, place)):
        raise ValueError(f"{shown(name)} has a shape or place that cannot be")
    if len(place) != 2 or place[1] >= 1 << 63 or len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"{shown(name)} has a shape or place that cannot be")
    entry = TensorEntry(file, data + place[0], DTYPES[dtype], tuple(shape))
    if place[1] - place[0] != entry.bytes:
        raise ValueError(f"{shown(name)} does not fit into its place")
    return entry
