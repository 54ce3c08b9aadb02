"""How long work tells the user where it is."""

from collections.abc import Callable
from contextlib import AbstractContextManager

Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""(description, number of steps) -> a context that shows the work; it gives the function that counts one step."""
