"""A curve of misses for a model that nobody has run yet, lent from a model that is shipped."""

from dataclasses import dataclass

import numpy as np
import torch

from cachemoe.moe.checkpoint import TINYMOE, Checkpoint
from cachemoe.moe.layers import recorded_routers
from cachemoe.moe.models import load_model
from cachemoe.moe.progress import Progress
from cachemoe.moe.text import HELD_OUT, load_tokens
from cachemoe.offload.errors import InputError
from cachemoe.offload.simulate import lru_misses

WINDOWS, CONTEXT = 8, 512


@dataclass(frozen=True)
class MissCurve:
    """Misses of LRU under a model's own routing of a text.

    Args:
        model: its name.
        text: the text's.
        tokens: of it.
        top_k: K, experts that a token uses.
        rates: by slots of a layer, 0 to E: share of the selections that miss; infinite below K.
    """

    model: str
    text: str
    tokens: int
    top_k: int
    rates: list[float]

    def at(self, share: float) -> float:
        """The miss rate where a pool holds that share of the experts, between two numbers of slots on a line.

        Raises:
            InputError: for a share that does not hold the K experts of a token of the model that lends.
        """
        experts = len(self.rates) - 1
        if not self.top_k / experts <= share:
            raise InputError(
                f"a pool of {share:.1%} of the experts is less than the {self.top_k} of {experts} that a token of "
                f"{self.model} uses, which lends its misses: give --miss-rate"
            )
        slots = range(self.top_k, experts + 1)
        return float(np.interp(share * experts, slots, self.rates[self.top_k :]))


@torch.inference_mode()
def lent_misses(progress: Progress) -> MissCurve:
    """The curve of tinymoe on held-out prose, cold at first; a pool of all experts misses none, since it is filled."""
    shape = Checkpoint(TINYMOE).shape
    model = load_model(TINYMOE)
    tokens = load_tokens(None, shape.vocabulary, WINDOWS * CONTEXT)
    chosen = [[] for _ in shape.layers]
    with progress(f"{TINYMOE.name}'s misses, to be lent", WINDOWS) as advance:
        for window in tokens.view(WINDOWS, CONTEXT):
            with recorded_routers(model) as answers:
                model(window[None])
            for ids, (answer,) in zip(chosen, answers, strict=True):
                ids.append(answer.ids)
            advance()
    misses = sum(lru_misses(torch.cat(ids), shape.experts) for ids in chosen)
    rates = (misses / (len(chosen) * len(tokens) * shape.top_k)).tolist()
    return MissCurve(TINYMOE.name, HELD_OUT, len(tokens), shape.top_k, [*rates[:-1], 0.0])
