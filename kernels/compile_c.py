"""C beside the kernels: compiled for this very processor when first needed, and kept in the cache directory."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from cachemoe.kernels.cache_folder import cache_directory, make_folder

# Threads come from the OpenMP that torch has loaded: it is not linked, or there could be a second pool of them.
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-fno-strict-aliasing", "-fopenmp")
COMPILERS = ("cc", "gcc", "clang")
DIGEST_BYTES = 32  # at the end of a library, behind what the loader reads: of all before it


@cache
def compile_c(source: Path, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The source's functions, compiled by ``$CC`` or the first of ``COMPILERS``, with ``flags`` beside ``FLAGS``.

    A library that is kept is looked at before it is loaded, and made again if it is damaged: the system would map it,
    and fail later or end the process.

    Raises:
        OSError: if there is no compiler, it refuses the source, or the cache directory cannot be used.
    """
    try:
        compiler = shlex.split(os.environ.get("CC", "")) or list(filter(shutil.which, COMPILERS))[:1]
    except ValueError as error:
        raise OSError(f"CC is no command ({error})") from error
    if not compiler:
        raise OSError(f"there is no C compiler ({', '.join(COMPILERS)})")
    command = [*compiler, *FLAGS, *flags]
    parts = [file.read_bytes() for file in (source, *sorted(source.parent.glob("*.h")))]
    key = hashlib.sha256(b"\0".join((*parts, os.fsencode(shlex.join(command)), _processor().encode())))
    make_folder(cache_directory())
    library = cache_directory() / f"{source.stem}-{key.hexdigest()[:16]}.so"  # asked of the folder that is there now
    if not _is_whole(library):
        with TemporaryDirectory(dir=library.parent) as folder:  # beside it, so that it can be moved whole
            compiled, linked = Path(folder) / "compiled.o", Path(folder) / "linked.so"
            _run([*command, "-c", str(source), "-o", str(compiled)])
            _run([*compiler, "-shared", str(compiled), "-o", str(linked)])
            with open(linked, "r+b") as file:
                digest = hashlib.sha256(file.read()).digest()
                file.write(digest)
                file.flush()
                os.fsync(file.fileno())
            os.replace(linked, library)
    return ctypes.CDLL(str(library))


def why_not(load: Callable[[], ctypes.CDLL]) -> str | None:
    """Why the library that ``load`` gives cannot be had, in words; None where it can."""
    try:
        load()
    except (OSError, AttributeError) as error:  # the latter if $CC makes something else of the source
        return str(error)
    return None


def _is_whole(library: Path) -> bool:
    """Whether a library is there, as it was made."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise OSError(f"{shlex.join(command)} failed: {(done.stderr or done.stdout).strip()}")


def _processor() -> str:
    """What distinguishes machines and containers that share a home directory, so far as compiled code shows it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    told = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return " ".join((platform.machine(), platform.processor(), *platform.libc_ver(), *told))
