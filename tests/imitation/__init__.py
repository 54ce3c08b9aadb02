"""An imitation of two GPUs: what a test marked ``gpu`` runs on where there is none.

Tensors say ``cuda``, their data lies in CPU memory, kernels run in Triton's interpreter. It is there for what a GPU
refuses and a CPU does not mind, and for what a GPU puts off:

- Refused are tensors of different devices in one operation, pageable host memory given to a kernel, a kernel launched
  while another device is the current one, a comparison of events of different devices, and, while a graph is captured,
  whatever waits for the device or copies pageable memory.
- Outside of a capture every wait of the host is noted, with its place (``streams.Machine.waits``).
- A capture does nothing that the program could see. A replay does what was captured, on the same memory, with Python's
  numbers as they were.
- Work on a stream other than its device's default one is done as late as the program allows, when something waits for
  it. Where a wait is missing, results are wrong, or work is left behind.
- Memory that nothing has been written to is NaN.

``tensors`` has the tensors and how operations on them run, ``streams`` when, ``memory`` page-locked memory, and ``gpu``
what puts all of it in torch's place and takes it away again. What it cannot show, and what will, is in CONTRIBUTING.md
("A test on a GPU").
"""

from imitation.gpu import imitated_gpu

__all__ = ["imitated_gpu"]
