"""One decode step of a model over a static cache: in a CUDA graph on a GPU, step by step on a CPU."""

from contextlib import nullcontext

import torch

from cachemoe.offload.capture import beside, captured
from cachemoe.offload.errors import InputError

WARM_UP = 2  # steps run before the capture, for what libraries set up and compile at their first calls


class DecodeGraph:
    """Decodes token by token. On a GPU the third step is captured, and it and those after it are replayed.

    The first two run as they are: they too are steps of the sequence, so that nothing has to be undone. What the
    model's routing and experts do must be the same kernels on the same memory whatever the token, as with
    ``DeviceEngine``.

    Args:
        model: whose forward waits for no GPU.
        past: its static cache, holding the context.
    """

    def __init__(self, model, past):
        self._model, self._past = model, past
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps = 0

    @torch.inference_mode()
    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Queue the next token's step.

        Args:
            token: a number, int64, on the model's device.

        Returns:
            ``[V]`` logits; on a GPU the next step overwrites them.

        Raises:
            InputError: if the model cannot be captured.
        """
        self._token.copy_(token)
        with torch.cuda.device(self._token.device) if self._token.is_cuda else nullcontext():
            self._step()
        self._steps += 1
        return self._logits

    def _step(self) -> None:
        if self._graph is None and self._token.is_cuda and self._steps >= WARM_UP:
            self._capture()
        if self._graph is not None:
            self._graph.replay()
        elif self._token.is_cuda:
            with beside():
                self._run()
        else:
            self._run()

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with captured(graph, self._token.device):
                self._run()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"{type(self._model).__name__} cannot be captured in a CUDA graph: let the host drive it ({reason})"
            ) from error
        self._graph = graph

    def _run(self) -> None:
        self._logits = self._model(self._token, past_key_values=self._past, use_cache=True).logits[0, -1]
