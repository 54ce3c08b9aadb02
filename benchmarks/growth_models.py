"""The models of ``cachemoe growth``: made, packed and opened, and nothing of them left."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from cachemoe.benchmarks.synthetic import write_model
from cachemoe.kernels.cache_folder import make_folder
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.fingerprint import forget
from cachemoe.moe.load import load
from cachemoe.moe.pack import pack, store_directory
from cachemoe.moe.progress import Progress
from cachemoe.moe.shape import MoeShape


@dataclass(frozen=True)
class Files:
    """A checkpoint's folder, and its store."""

    checkpoint: Path
    store: Path

    def load(self, pool: str, dense: str | None, progress: Progress):
        """The model with its experts in a pool, on the CPU; see ``load``."""
        return load(self.checkpoint, pool, store=self.store, device="cpu", dense=dense, progress=progress)[0]


@contextmanager
def made(shape: MoeShape, format: str | None, progress: Progress) -> Iterator[Files]:
    """A random model of that shape and its store, beside other stores: on the disk that pages usually come from.

    They are removed at the end; a model that was loaded meanwhile can be used on, since its store is open.

    Raises:
        InputError: for a shape or a format that cannot be, or a disk without room.
        OSError: if the checkpoint cannot be written.
    """
    make_folder(store_directory())
    with TemporaryDirectory(prefix="growth-", dir=store_directory()) as name:
        files = Files(Path(name) / "model", Path(name) / "store.safetensors")
        write_model(files.checkpoint, shape, progress)
        checkpoint = Checkpoint(files.checkpoint)
        try:
            pack(checkpoint, checkpoint.layout(format), files.store, progress)
            yield files
        finally:
            forget(checkpoint)
