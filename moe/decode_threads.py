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

WINDOW, TRIAL = 8, 4  # tokens that are looked at, and that the other number of threads is tried on
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
        self._recent, self._trial = deque(maxlen=WINDOW), None
        self._usual: float | None = None  # seconds of a token with all threads
        self._since = 0  # tokens since the last trial

    def note(self, seconds: float) -> None:
        """A token has taken so long."""
        if self._trial is not None:
            self._trial.append(seconds)
            if len(self._trial) == TRIAL:
                self._decide(median(self._trial[1:]))  # the first found other caches
            return
        self._recent.append(seconds)
        self._since += 1
        if len(self._recent) == WINDOW and self._doubts():
            self.one, self._trial = not self.one, []

    def _doubts(self) -> bool:
        if self.one:
            return self._since >= AGAIN
        now = median(self._recent)
        if self._usual is not None and now <= SLOWER * self._usual:
            self._usual = min(self._usual, now)
            return False
        return True

    def _decide(self, tried: float) -> None:
        """Go on as in the trial, or as before."""
        before = median(self._recent)
        if tried < FASTER * before:
            self._recent.clear()
            before = tried
        else:
            self.one = not self.one
        self._usual, self._trial, self._since = None if self.one else before, None, 0


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
