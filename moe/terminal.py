"""What every command does at the terminal: where it prints, and how it fails."""

import json
import math
from collections.abc import Container, Iterable
from contextlib import contextmanager
from errno import EISDIR
from pathlib import Path
from tempfile import TemporaryFile

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from cachemoe.offload.errors import InputError
from cachemoe.offload.files import whole_file

NOT_FINITE = {
    "inf": "inf: more than a float holds",
    "-inf": "-inf: less than a float holds",
    "nan": "nan: computed from figures that are not finite",
}
console = Console()
errors = Console(stderr=True)


def table_of(title: str | None, names: str, headings: Iterable[str], left: Container[str] = ()) -> Table:
    """An empty table: a column of names, and columns of figures, to the right but for those named in ``left``."""
    style = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD, "padding": 0, "show_edge": False}
    table = Table(title=title, **style)
    table.add_column(names, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    return table


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

    JSON has no figures that are not finite: each is null, and ``not_finite`` beside it says what it was.

    Raises:
        OSError: if it cannot be written.
    """
    with whole_file(path) as partial:
        partial.write_text(json.dumps(_finite(report), indent=1, allow_nan=False))
    console.print(f"[dim]Every figure: {path}.[/dim]")


def _finite(value):
    """The same with None for each float that is not finite; the innermost dictionary around it says why."""
    if isinstance(value, dict):
        lost = {}
        for name, each in value.items():
            figures = each if isinstance(each, (list, tuple)) else [each]
            if reasons := dict.fromkeys(NOT_FINITE[str(figure)] for figure in figures if _is_lost(figure)):
                lost[name] = "; ".join(reasons)
        return {name: _finite(each) for name, each in value.items()} | ({"not_finite": lost} if lost else {})
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if _is_lost(value) else value


def _is_lost(value) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
