"""llama.cpp, through the ``xllamacpp`` wheel: one token after given ones, and the seconds that it says it took."""

import json
from pathlib import Path

import torch

CONTEXT = 1024


class LlamaCpp:
    """A GGUF model on this machine's cores; a context manager.

    Args:
        path: of the file.
        repack: whether matrices are laid out anew for the processor, which copies them into memory; else they stay in
            the mapped file.
        context: tokens that it has room for, that of the answer among them.
    """

    def __init__(self, path: Path, repack: bool, context: int = CONTEXT):
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = context, 1, False, 0
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
        parameters.no_extra_bufts = not repack
        parameters.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
        self._server = xllamacpp.Server(parameters)

    def next_token(self, tokens: list[int], anew: bool = False) -> tuple[int | None, float]:
        """The token after these, of the highest logit, and the seconds that those took which it had not seen.

        Args:
            anew: whether it forgets all of them first.

        Returns:
            None in the token's place for one that is no character by itself, of which llama.cpp does not tell.
        """
        asked = {"prompt": tokens, "n_predict": 1, "cache_prompt": not anew, "temperature": 0.0, "n_probs": 1}
        answer = self._server.handle_completions(asked)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        told = (answer["choices"][0].get("logprobs") or {}).get("content") or [{"id": None}]
        return told[0]["id"], answer["timings"]["prompt_ms"] / 1e3

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server = None
