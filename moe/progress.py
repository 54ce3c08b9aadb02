"""How long work tells the user where it is."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""(description, number of steps) -> a context that shows the work; it gives the function that counts one step."""


@contextmanager
def show_progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, a line elsewhere, on standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(description, highlight=False)
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)
