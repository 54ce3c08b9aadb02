"""ExpertStore: every expert's page in one file on disk, read past the page cache.

The file is plain safetensors: ``pages`` (``[L * E, page_bytes]`` uint8, starting at a multiple of 4 KiB so that
O_DIRECT can read it), then ``xxh3`` (``[L * E]`` uint64, the XXH3 checksum of each page), and the layout in its
metadata. No path is stored in it.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from xxhash import xxh3_64_intdigest as checksum

from cachemoe.kernels.formats import LARGEST, PAGE_ALIGNMENT, PageFormat
from cachemoe.offload.errors import InputError
from cachemoe.offload.files import whole_file
from cachemoe.offload.header import parse_json, read_header

VERSION = 4
UNKNOWN_MODEL = "0" * 32  # in place of a fingerprint that is not made yet


@dataclass(frozen=True)
class StoreLayout:
    """What a store holds.

    Args:
        model: fingerprint of the checkpoint the pages come from.
        layers: L, MoE layers.
        experts: E, experts a layer.
        page_format: layout of each page.
        revision: commit of the hub's repository that the checkpoint came from; empty for any other. It says where the
            weights are from, and ``model`` alone which they are.
    """

    model: str
    layers: int
    experts: int
    page_format: PageFormat
    revision: str = field(default="", compare=False)

    def metadata(self) -> dict[str, str]:
        """The layout as safetensors metadata."""
        fields = {"version": VERSION, "model": str(self.model), "layers": self.layers, "experts": self.experts}
        fields["revision"] = self.revision
        fields |= asdict(self.page_format)
        return {"cachemoe": json.dumps(fields)}

    @classmethod
    def parse(cls, path: Path, metadata: dict[str, str] | None) -> "StoreLayout":
        """The layout of the store at ``path``, from its metadata.

        Raises:
            InputError: if it is no store, or of another version.
        """
        try:
            fields = parse_json((metadata or {})["cachemoe"].encode())
            version = fields.pop("version")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not a cachemoe store: give the path of one") from error
        if type(version) is not int or version != VERSION:
            raise InputError(
                f"{path} is a store of version {str(version)[:20]}, and this is version {VERSION}: make it again"
            )
        try:
            model, layers, experts, revision = map(fields.pop, ("model", "layers", "experts", "revision"))
            layout = cls(model, layers, experts, PageFormat(**fields), revision)
            numbers = (layout.layers, layout.experts, layout.page_format.hidden, layout.page_format.intermediate)
            if not all(type(number) is int and 0 < number < LARGEST for number in numbers):
                raise ValueError("its dimensions cannot be")
            if not isinstance(layout.model, str) or not isinstance(layout.revision, str):
                raise ValueError("its fingerprint or revision is no text")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} has a broken layout in its header: make it again") from error
        return layout


class Store(Protocol):
    """Where every page lives, as engines and links see it: a file, or page-locked memory.

    Attributes:
        layout: what it holds.
        pages: number of pages, L * E.
        page_bytes: bytes of each.
    """

    layout: StoreLayout
    pages: int
    page_bytes: int

    def offset(self, layer: int, expert: int) -> int:
        """First byte of a page, as ``read_into`` counts."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Copy ``len(buffer)`` bytes of one page at ``offset``; any thread may call it, and what it raises says why."""

    def check(self, layer: int, expert: int, page: memoryview) -> None:
        """See that a page that was read whole is as it was written; what it raises says that it is not."""


class PinnedPages(Store, Protocol):
    """A store whose pages lie in page-locked memory while they are leased, for a GPU to copy.

    They are checked on their way into it, so that ``check`` does nothing.

    Attributes:
        permanent: whether a page stays where it is when its lease ends.
    """

    permanent: bool

    def lease(self, layer: int, expert: int) -> AbstractContextManager[torch.Tensor]:
        """The page, ``[page_bytes]`` uint8, there until the block ends; a GPU's copy of it has to end before."""


class ExpertStore:
    """A store opened for reading; close it, or use it as a context manager.

    Args:
        path: the file.
        expected: the layout it must have, if known.
        check_reads: whether ``check`` looks at what was read.

    Attributes:
        layout, pages, page_bytes: as ``Store``'s.
        direct: whether reads bypass the page cache (O_DIRECT); False where the file system refuses.

    Raises:
        InputError: if the file is missing, cut short, or holds something else than ``expected``.
    """

    def __init__(self, path: str | os.PathLike, expected: StoreLayout | None = None, check_reads: bool = True):
        self.path = Path(path)
        try:
            metadata, entries = read_header(self.path)
        except FileNotFoundError as error:
            raise InputError(f"there is no store at {self.path}") from error
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path} is not a cachemoe store, or one that is cut short or damaged ({error}): if it was one, "
                "remove it and make it again"
            ) from error
        self.layout = StoreLayout.parse(self.path, metadata)
        if expected is not None and self.layout != expected:
            raise InputError(f"{self.path} holds pages of another model or format: remove it or choose another path")
        self.pages = self.layout.layers * self.layout.experts
        self.page_bytes = self.layout.page_format.page_bytes
        pages, checksums = (entries.get(name) for name in ("pages", "xxh3"))
        if (
            pages is None
            or checksums is None
            or (pages.dtype, pages.shape) != (torch.uint8, (self.pages, self.page_bytes))
            or pages.start % PAGE_ALIGNMENT
            or (checksums.dtype, checksums.shape) != (torch.uint64, (self.pages,))
        ):
            raise InputError(f"{self.path} does not hold what its layout says: remove it and make it again")
        self._data_start, self._check_reads = pages.start, check_reads
        try:
            self._checksums = checksums.read().tolist()
            self._fd, self.direct = _open_for_reading(self.path, self._data_start)
        except (OSError, EOFError) as error:
            raise InputError(f"{self.path} cannot be read, or was cut short while it was opened: {error}") from error

    def offset(self, layer: int, expert: int) -> int:
        """First byte of a page in the file."""
        return self._data_start + (layer * self.layout.experts + expert) * self.page_bytes

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Read ``len(buffer)`` bytes at ``offset``; both, and the buffer's address, are multiples of 4 KiB.

        Raises:
            InputError: if the read fails or ends early.
            RuntimeError: if the store is closed.
        """
        if self._fd < 0:
            raise RuntimeError(f"{self.path} is closed")
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise InputError(
                    f"{self.path} cannot be read at byte {offset + done} ({error.strerror}): see to its disk, or "
                    "remove the file and make it again"
                ) from error
            if done + count < len(buffer):
                count -= count % PAGE_ALIGNMENT  # the next read has to be aligned as well
            if count == 0:
                raise InputError(
                    f"{self.path} ended early, {done} of {len(buffer)} bytes after byte {offset}: it was cut short "
                    "after it was opened; remove it and make it again"
                )
            done += count

    def page(self, layer: int, expert: int) -> torch.Tensor:
        """A page, ``[page_bytes]`` uint8, in memory of its own.

        Raises:
            InputError: as ``read_into`` and ``check``.
        """
        page = aligned_buffer(self.page_bytes)
        self.read_into(memoryview(page), self.offset(layer, expert))
        self.check(layer, expert, memoryview(page))
        return torch.from_numpy(page)

    def check(self, layer: int, expert: int, page: memoryview) -> None:
        """Compare a page that was read with its checksum, unless the store was opened not to.

        A page that differs is read once more, since memory and buses fail too.

        Args:
            page: its ``page_bytes``, as ``read_into`` needs a buffer.

        Raises:
            InputError: if the page on the disk is damaged, or cannot be read again.
        """
        if self._check_reads:
            self._check(layer, expert, page)

    def verify(self, advance: Callable[[], None] = lambda: None) -> None:
        """Check every page against its checksum.

        Args:
            advance: called after each page.

        Raises:
            InputError: naming the first page that differs.
        """
        page = memoryview(aligned_buffer(self.page_bytes))
        for index in range(self.pages):
            layer, expert = divmod(index, self.layout.experts)
            self.read_into(page, self.offset(layer, expert))
            self._check(layer, expert, page)
            advance()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _check(self, layer: int, expert: int, page: memoryview) -> None:
        expected = self._checksums[layer * self.layout.experts + expert]
        if checksum(page) == expected:
            return
        self.read_into(page, self.offset(layer, expert))
        if checksum(page) != expected:
            raise InputError(
                f"{self.path}: the page of layer {layer}, expert {expert} is damaged (its checksum differs): remove "
                "the file and make it again"
            )


def write_store(
    path: str | os.PathLike,
    layout: StoreLayout,
    pages: Iterable[torch.Tensor],
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Write a store by streaming; it appears under its name only when complete.

    Args:
        path: the file to make; replaced if it exists.
        layout: what it will hold; ``str(layout.model)`` is asked once more when all pages have been taken, and has the
            same length then.
        pages: L * E pages, ``[page_bytes]`` uint8 each, expert by expert, layer by layer; taken while nobody else
            writes the file.
        advance: called after each page.

    Raises:
        InputError: if the disk is full or the directory cannot be written; no partial file is left.
        ValueError: if ``pages`` are too few, too many, or of a wrong size.
    """
    path = Path(path)
    count, size = layout.layers * layout.experts, layout.page_format.page_bytes

    checksums = []
    try:
        with whole_file(path) as partial, open(partial, "wb") as file:
            file.write(_header(layout, count, size))
            for page in pages:
                if page.numel() != size:
                    raise ValueError(f"a page has {page.numel()} bytes, and the layout says {size}")
                file.write(page.numpy())
                checksums.append(checksum(page.numpy()))
                advance()
            if len(checksums) != count:
                raise ValueError(f"{len(checksums)} pages given, and the layout says {count}")
            file.write(np.array(checksums, dtype="<u8").tobytes())
            file.seek(0)
            file.write(_header(layout, count, size))
    except OSError as error:
        gigabytes = count * size / 1e9
        raise InputError(f"cannot write the store {path} of {gigabytes:.2f} GB: {error.strerror or error}") from error


def aligned_buffer(size: int) -> np.ndarray:
    """``[size]`` uint8 at a 4 KiB-aligned address, as O_DIRECT needs; size is rounded up to 4 KiB inside."""
    buffer = np.empty(size + PAGE_ALIGNMENT, dtype=np.uint8)
    start = -buffer.ctypes.data % PAGE_ALIGNMENT
    return buffer[start : start + size]


def _header(layout: StoreLayout, count: int, size: int) -> bytes:
    pages_end = count * size
    header = {
        "__metadata__": layout.metadata(),
        "pages": {"dtype": "U8", "shape": [count, size], "data_offsets": [0, pages_end]},
        "xxh3": {"dtype": "U64", "shape": [count], "data_offsets": [pages_end, pages_end + 8 * count]},
    }
    text = json.dumps(header).encode()
    # safetensors allows trailing spaces in the header: they put the first page at a multiple of 4 KiB.
    text += b" " * (-(8 + len(text)) % PAGE_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _open_for_reading(path: Path, probe_offset: int) -> tuple[int, bool]:
    """A file descriptor, with O_DIRECT where a trial read works."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except (OSError, AttributeError):  # refused by the file system; or no such flag on this platform
        return os.open(path, os.O_RDONLY), False
    try:
        os.preadv(fd, [memoryview(aligned_buffer(PAGE_ALIGNMENT))], probe_offset)
    except OSError:
        os.close(fd)
        return os.open(path, os.O_RDONLY), False
    return fd, True
