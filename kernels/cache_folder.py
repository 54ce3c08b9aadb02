"""Where cachemoe keeps what can be made again: where nobody else can write, since code and weights come from it."""

import os
import stat
from pathlib import Path


def cache_directory() -> Path:
    """``$CACHEMOE_CACHE``, else ``$XDG_CACHE_HOME/cachemoe``, else ``~/.cache/cachemoe``; it need not exist yet.

    Where others can write there too, as in a folder that users share, it is a folder of this user's own in it.

    Raises:
        OSError: if there is no home, or others could replace what is kept there.
    """
    if chosen := os.environ.get("CACHEMOE_CACHE"):
        folder = Path(os.path.expanduser(chosen))
    else:
        try:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cachemoe"
        except RuntimeError as error:
            raise OSError("there is no home directory: set CACHEMOE_CACHE to a folder of yours") from error
    try:
        found = os.stat(folder)
    except FileNotFoundError:
        return folder
    except OSError as error:
        raise OSError(
            f"{folder} cannot be made or looked into ({error.strerror}): set CACHEMOE_CACHE to another folder"
        ) from error
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"the cache directory {folder} is no folder: set CACHEMOE_CACHE to one of yours")
    trusted = found.st_uid in (os.geteuid(), 0)
    if trusted and not found.st_mode & OTHERS_WRITE:
        return folder
    if not trusted or not found.st_mode & stat.S_ISVTX:
        raise PermissionError(
            f"others can replace what is in the cache directory {folder}: `chmod go-w` it, if it is yours, or set "
            "CACHEMOE_CACHE to a folder of yours"
        )
    own = folder / f"user-{os.geteuid()}"
    try:
        found = os.lstat(own)
    except FileNotFoundError:
        return own
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & OTHERS_WRITE:
        raise PermissionError(f"{own} is not a folder of yours alone: set CACHEMOE_CACHE to one that is")
    return own


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where only this user can write, whatever the umask allows.

    Raises:
        OSError: if the system refuses.
    """
    if not folder.is_dir():
        if folder.parent != folder:
            make_folder(folder.parent)
        folder.mkdir(mode=0o755, exist_ok=True)


OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
