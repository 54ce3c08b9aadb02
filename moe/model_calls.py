"""What is done around each call of a model: how many sequences it has is noted, and a token's threads are chosen."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from threading import local

import torch

Around = Callable[[int, int], AbstractContextManager]


class ModelCalls:
    """Puts contexts around the calls of a model's inner part, which a user may call alone too, until ``close``.

    The forward is wrapped, since torch's hooks are not run when Ctrl-C ends a call.

    Args:
        model: of transformers.
        around: (sequences, tokens of each) -> a context of the call.
    """

    def __init__(self, model, *around: Around):
        self._inner, self._around = model.base_model, around
        self._own, forward = vars(self._inner).get("forward"), self._inner.forward

        @wraps(forward)
        def call(*arguments, **named):
            given = (*arguments[:1], named.get("input_ids"), named.get("inputs_embeds"))
            tokens = next((each for each in given if isinstance(each, torch.Tensor) and each.dim() > 1), None)
            if tokens is None or torch.jit.is_tracing():
                return forward(*arguments, **named)
            with ExitStack() as stack:
                for each in self._around:
                    stack.enter_context(each(*tokens.shape[:2]))
                return forward(*arguments, **named)

        self._call = self._inner.forward = call

    def close(self) -> None:
        """Give the model its own forward back, or, where another has been put around it, do nothing in it any more."""
        self._around = ()
        if vars(self._inner).get("forward") is self._call:
            del self._inner.forward
            if self._own is not None:
                self._inner.forward = self._own


class BatchShape:
    """How many sequences the call has that a thread is in: a model's MoE blocks see their tokens as one list."""

    def __init__(self):
        self._now = local()

    @contextmanager
    def during(self, sequences: int, tokens: int) -> Iterator[None]:
        """A call of so many sequences, and tokens of each."""
        self._now.shape = sequences, tokens
        try:
            yield
        finally:
            del self._now.shape

    def by_sequence(self, rows: torch.Tensor) -> torch.Tensor:
        """``[B * T, ...]`` as ``[B, T, ...]``; rows that are not all of the call's are taken for one sequence."""
        sequences, tokens = getattr(self._now, "shape", (1, len(rows)))
        return rows.unflatten(0, (sequences, tokens)) if len(rows) == sequences * tokens else rows[None]
