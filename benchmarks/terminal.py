"""What every command does at the terminal: where it prints, and how it fails."""

import json
from contextlib import contextmanager
from errno import EISDIR
from pathlib import Path
from tempfile import TemporaryFile

import typer
from rich.console import Console

from cachemoe.offload.errors import InputError
from cachemoe.offload.files import whole_file

console = Console()
errors = Console(stderr=True)


@contextmanager
def one_sentence():
    """What a person can mend ends the program in one sentence, without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print("cachemoe: interrupted")
        raise typer.Exit(130) from None
    except ModuleNotFoundError as error:
        errors.print(
            f"cachemoe: {error.name} is missing: pip install 'cachemoe[hf,bench]'", markup=False, highlight=False
        )
        raise typer.Exit(2) from None
    except (InputError, OSError) as error:
        errors.print(f"cachemoe: {error}", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(2) from None


def check_destination(path: Path) -> None:
    """Whether a result can be written, before the work that makes it."""
    try:
        if path.is_dir():
            raise IsADirectoryError(EISDIR, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): choose another file") from error


def save_report(report: dict, path: Path) -> None:
    """Write every figure as JSON, whole or not at all, and say where.

    Raises:
        OSError: if it cannot be written.
    """
    with whole_file(path) as partial:
        partial.write_text(json.dumps(report, indent=1, allow_nan=False))
    console.print(f"[dim]Every figure: {path}.[/dim]")
