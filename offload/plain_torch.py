"""What torch is set to around a call, and what has to be made regardless of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def plain_torch() -> Iterator[None]:
    """A context, and a decorator: whatever stays after the call is made as if the caller had set nothing.

    Under the caller's inference mode, lasting tensors could not be written outside of it; under another default device
    they would lie elsewhere; and under autocast a router that is asked for its rule would round.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield
