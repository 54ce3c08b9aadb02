"""Products of one row on the CPU by torch's own kernels: oneDNN's read weights at half the speed of memory, and take
40 microseconds where there is next to nothing to read."""

from threading import Lock

import torch


class OneRow:
    """A context in which torch does not ask oneDNN, in any thread; any number of threads may be in it."""

    def __init__(self):
        self._lock, self._inside, self._before = Lock(), 0, True

    def __enter__(self):
        with self._lock:
            if self._inside == 0:
                self._before = torch._C._get_mkldnn_enabled()
                torch._C._set_mkldnn_enabled(False)
            self._inside += 1

    def __exit__(self, *_):
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch._C._set_mkldnn_enabled(self._before)


ONE_ROW = OneRow()
