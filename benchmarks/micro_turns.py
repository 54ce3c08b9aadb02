"""In which order the microbenchmarks run: implementations take turns, so that a machine's moods reach them alike."""

from collections.abc import Callable, Iterable

import pytest

REPETITIONS = range(3)


def in_turns(cases: Iterable[tuple], implementations: Callable[..., Iterable]) -> list:
    """pytest's parameters (*case, repetition, implementation): every implementation of a case once, then all again.

    Args:
        implementations: of the case that it is called with.
    """
    return [
        pytest.param(*run, id="-".join(map(str, run)).replace(" ", "_"))
        for case in cases
        for repetition in REPETITIONS
        for name in implementations(*case)
        for run in [(*case, repetition, name)]
    ]
