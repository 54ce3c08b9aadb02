"""Decoder layers that take one token in one call, experts included: which they are, and while they are."""

from dataclasses import dataclass
from threading import get_ident

import torch

from cachemoe.kernels.attention_cpu import Attention
from cachemoe.kernels.layer_cpu import Layer, Router
from cachemoe.moe.contents import Contents
from cachemoe.moe.layers import MoeLayer, Probe
from cachemoe.moe.routers import RouterOutput
from cachemoe.offload.errors import InputError

PROBED = 4  # tokens that a block is asked about, one by one


@dataclass(eq=False)
class WholeLayer:
    """A decoder layer whose block does nothing but ask its router and run the experts.

    Args:
        number: of the MoE layer.
        attention: and the norms around it.
        router: as the C chooses in its place.
        contents: of block, router and experts.
        layer: in C, where the pool was when it last took a token.
    """

    number: int
    attention: Attention
    router: Router
    contents: Contents
    layer: Layer | None = None


def router_of(layer: MoeLayer, asked: Probe, chosen: dict, places: bool) -> Router | None:
    """A router as the C chooses in its place; None where the C cannot, or the block around it does more.

    Args:
        layer: with the model's own router.
        asked: what that answered.
        chosen: as ``Chooser.in_c`` gives it.
        places: as ``Router`` has it.
    """
    if asked.logits_of is None or not _is_plain(layer):
        return None
    weight, bias = layer.router.weight, getattr(layer.router, "bias", None)
    router = Router(weight, bias, asked.output.logits.dtype, asked.output.weights.dtype, places=places, **chosen)
    return router if router.fits else None


@torch.inference_mode()
def _is_plain(layer: MoeLayer) -> bool:
    """Whether a block gives what its experts give of its own input and of its router's answer."""
    experts, weight, asked, answers = layer.experts, layer.router.weight, [], []
    own, forward, thread = vars(experts).get("forward"), experts.forward, get_ident()

    def run(*arguments):
        if get_ident() != thread:  # which goes on with the model meanwhile
            return forward(*arguments)
        asked[:] = arguments
        return 0.5 * arguments[0]

    def note(router, given, answer):
        if get_ident() == thread:
            answers.append(answer)

    experts.forward, hook = run, layer.router.register_forward_hook(note)
    try:
        generator = torch.Generator().manual_seed(0)
        for x in torch.randn(PROBED, 1, weight.shape[1], generator=generator).to(weight.dtype):
            y, answer = layer.block(x[None]), RouterOutput.of(answers.pop(), layer.count)
            pairs = zip((y, *asked), (0.5 * x[None], x, answer.ids, answer.weights), strict=True)
            if not all(isinstance(a, torch.Tensor) and torch.equal(a, b) for a, b in pairs):
                return False
    except (InputError, TypeError, ValueError, RuntimeError, LookupError, AttributeError):  # called in another way
        return False
    finally:
        hook.remove()
        vars(experts).pop("forward", None)
        if own is not None:
            experts.forward = own
    return True
