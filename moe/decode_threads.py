"""How many threads a token takes on the CPU: all of torch's, or one where that is faster.

A token's matrices are short, and its threads wait for each other some hundred times. Where another process keeps a core
busy, each wait can last until the system gives that core back: a token takes many times as long as with one thread,
which waits for nobody. Where nothing else runs, all threads are faster but for the smallest models. Times alone show
which it is, so that it is tried. It is for models in bfloat16: no bit of theirs depends on it, where attention in
float32 sums in another order.
"""

import ctypes
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from threading import Lock
from time import perf_counter

import torch

WINDOW, TRIAL = 8, 4  # tokens that are looked at, and on which each number of threads is tried
SLOWER = 1.3  # than before: there may be something else that runs
FASTER = 0.9  # of the time: worth a change
AGAIN = 64  # tokens with one thread, after which all are tried again


# Of this thread alone; torch.set_num_threads would be of every thread that uses torch for the first time meanwhile.
_SET_THREADS = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)


class Choice:
    """From a thread's tokens' times, whether the next one takes one thread.

    Attributes:
        one: whether it does.
    """

    def __init__(self):
        self.one = False
        self._recent = deque(maxlen=WINDOW)
        self._trial: dict[bool, list[float]] | None = None  # seconds of tokens, in turns, by whether they took one
        self._before = False  # what was chosen before it
        self._usual: float | None = None  # seconds of a token with all threads
        self._since = 0  # tokens since the last trial

    def note(self, seconds: float) -> None:
        """A token has taken so long."""
        if self._trial is None:
            self._recent.append(seconds)
            self._since += 1
            if len(self._recent) == WINDOW and self._doubts():
                self._before, self._trial = self.one, {True: [], False: []}
                self.one = not self.one
            return
        self._trial[self.one].append(seconds)
        self.one = not self.one
        if min(map(len, self._trial.values())) == TRIAL:
            self._decide()

    def _doubts(self) -> bool:
        if self.one:
            return self._since >= AGAIN
        now = median(self._recent)
        if self._usual is not None and now <= SLOWER * self._usual:
            self._usual = min(self._usual, now)
            return False
        return True

    def _decide(self) -> None:
        """Change only for what is faster by more than the noise."""
        times = {one: median(seconds) for one, seconds in self._trial.items()}
        changes = times[not self._before] < FASTER * times[self._before]
        self.one = self._before != changes
        self._usual = None if self.one else times[False]
        self._trial, self._since = None, 0
        self._recent.clear()


class DecodeThreads:
    """Sets torch's threads for the tokens of a model that come one by one, and puts them back after each.

    Where torch's threads are not OpenMP's, they stay as they are.

    Args:
        waited: seconds, so far, in which nothing was computed.
    """

    def __init__(self, waited: Callable[[], float]):
        self._waited, self._choice, self._lock = waited, Choice(), Lock()

    @contextmanager
    def during(self, sequences: int, tokens: int) -> Iterator[None]:
        """A call of so many sequences, and tokens of each."""
        threads = torch.get_num_threads()
        if (sequences, tokens) != (1, 1) or threads == 1 or _SET_THREADS is None:
            yield
            return
        one, start = self._choice.one, perf_counter() - self._waited()
        if one:
            _SET_THREADS(1)
        try:
            yield
        finally:
            if one:
                _SET_THREADS(threads)
        with self._lock:
            if one is self._choice.one:  # no other thread of the program has begun a trial meanwhile, or ended it
                self._choice.note(perf_counter() - self._waited() - start)
