"""Files that are either whole or not there, whoever else writes them at the same time."""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cachemoe.kernels.cache_folder import make_folder
from cachemoe.offload.errors import InputError

PARTIAL = ".partial"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes ``path``'s place when the block ends well, and is removed otherwise.

    Of threads and processes that write the same file one does at a time: the partial file is their lock. One that was
    killed leaves a partial file that is not locked, which the next takes over. The folder is made if it is not there.

    Raises:
        OSError: if the system refuses to write, sync or rename.
        InputError: if the partial file is somebody else's, or a link, or the file system has no locks.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # a folder the system itself refuses
        raise InputError(f"{path} is there already and no file, and is not replaced: choose another")
    make_folder(path.parent)
    partial = path.with_name(f"{path.name}{PARTIAL}")
    lock = _locked(partial)
    try:
        yield partial
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        if not _is_at(lock, partial):
            raise InputError(f"{partial} was removed or replaced while it was written: try again")
        os.replace(partial, path)
        with suppress(OSError):  # where the file system cannot, the file is whole all the same
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)  # or the name may be lost with the power
            finally:
                os.close(folder)
    finally:
        if _is_at(lock, partial):
            partial.unlink()
        fcntl.flock(lock, fcntl.LOCK_UN)  # closing does not unlock while a forked child has the file open as well
        os.close(lock)


def remove_orphans(folder: Path, pattern: str) -> None:
    """Remove the partial files of writers that were killed: those that nobody has locked.

    Args:
        pattern: as of ``Path.glob``, of the files that they would have become.
    """
    for partial in folder.glob(f"{pattern}{PARTIAL}"):
        with suppress(OSError):  # another's, or gone meanwhile
            file = os.open(partial, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(file, partial):
                    partial.unlink()
            finally:
                os.close(file)


def _locked(partial: Path) -> int:
    """A descriptor of the file, empty and locked: it is made, or taken over, and waited for where another has it."""
    while True:
        flags, made = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, True
        try:
            try:
                file = os.open(partial, flags | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                file, made = os.open(partial, flags), False
        except FileNotFoundError:
            if not partial.parent.is_dir():
                raise
            continue  # renamed or removed meanwhile
        except OSError as error:
            if partial.is_symlink():
                raise InputError(f"{partial} is a link, which is not followed: remove it") from error
            raise
        try:
            found = os.fstat(file)
            # One that was made here is this user's, whatever owner a network's file system shows.
            if not made and (not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink > 1):
                raise InputError(f"{partial} is not a file of yours alone: remove it, or write elsewhere")
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if made:  # another's may be in use
                    partial.unlink(missing_ok=True)
                raise InputError(
                    f"the file system of {partial.parent} has no locks ({error.strerror}): write elsewhere, or set "
                    "CACHEMOE_CACHE where it is the cache directory"
                ) from error
            if _is_at(file, partial):  # else it has been renamed or removed meanwhile
                os.ftruncate(file, 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    """Whether the path still names the open file."""
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(file))
