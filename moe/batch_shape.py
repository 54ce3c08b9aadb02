"""How many sequences a call of a model has: its MoE blocks see their tokens as one list."""

from threading import local

import torch


class BatchShape:
    """Notes at each call of a model, of each thread, how many sequences it has.

    Args:
        model: of transformers; hooks on it note that until ``close``.
    """

    def __init__(self, model):
        self._now = local()
        inner = model.base_model  # a user may call that alone, too
        self._hooks = (
            inner.register_forward_pre_hook(self._note, with_kwargs=True),
            inner.register_forward_hook(self._forget, always_call=True),
        )

    @property
    def sequences(self) -> int:
        """B of the call that the thread is in; 1 outside of any."""
        return getattr(self._now, "sequences", 1)

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _note(self, inner, arguments, named) -> None:
        given = (*arguments[:1], named.get("input_ids"), named.get("inputs_embeds"))
        self._now.sequences = next((each.shape[0] for each in given if isinstance(each, torch.Tensor)), 1)

    def _forget(self, *_) -> None:
        self._now.sequences = 1
