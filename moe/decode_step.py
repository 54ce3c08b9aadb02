"""A decoder layer's step of one token: all of its attention in one call, where its dense weights are rounded.

A layer is asked, as routers are: what the call gives of random hidden states is held to what the layer itself gives,
and one that differs keeps its own modules.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from cachemoe.kernels import attention_cpu
from cachemoe.kernels.attention_cpu import Attention, Norm
from cachemoe.kernels.one_row import ONE_ROW
from cachemoe.moe.contents import Contents
from cachemoe.moe.dense import RoundedLinear

PROBED = 5  # tokens before the one that is compared
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}  # of the largest number: both round, in orders of their own
GROWTH = 256  # tokens that a cache gets room for at least
PROJECTIONS = tuple(f"{name}_proj" for name in "qkvo")
NORMS = "q_norm", "k_norm"


def install_steps(model) -> list["Step"]:
    """Let the decoder layers that suit take one token at a time in their step; gives these."""
    owner = next((module for module in model.modules() if hasattr(module, "rotary_emb")), None)
    if owner is None or not attention_cpu.has_c():
        return []
    steps = [(layer, step) for layer in model.modules() if (step := _step_of(layer)) is not None]
    steps = [(layer, step) for layer, step in steps if _agrees(layer, step, owner.rotary_emb)]
    for layer, step in steps:
        layer.forward = MethodType(partial(_forward, step, layer.forward), layer)
    return [step for _, step in steps]


def _forward(step, own, layer, hidden_states, *others, **named):
    """The layer's forward."""
    if not others and step.takes(hidden_states, named):
        return step(hidden_states, named["past_key_values"], named["position_embeddings"])
    return own(hidden_states, *others, **named)


class Room:
    """A layer's keys and values, with room for more tokens: transformers would copy all of them for each.

    Args:
        keys, values: ``[1, heads, T, D]``.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        self.length = keys.shape[2]
        shape = *keys.shape[:2], max(2 * self.length, self.length + GROWTH), keys.shape[3]
        self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        self.keys[:, :, : self.length], self.values[:, :, : self.length] = keys, values
        self._shown = keys, values  # what the cache's layer has of them

    def goes_on(self, layer: DynamicLayer) -> bool:
        """Whether a cache's layer has all of these tokens and no other, and there is room for one more."""
        keys, values = self._shown
        return layer.keys is keys and layer.values is values and self.length < self.keys.shape[2]

    def show(self, layer: DynamicLayer) -> None:
        """Let the layer have one token more, which has been written."""
        self.length += 1
        self._shown = tuple(each.narrow(2, 0, self.length) for each in (self.keys, self.values))
        layer.keys, layer.values = self._shown


@dataclass(eq=False)
class Step:
    """One decoder layer: x + attention(norm(x)), and to that what follows of its norm.

    Args:
        attention: the layer's.
        feed: the module after it.
        number: of its keys and values in the cache.
        width: H.
        contents: of the modules that the call stands for.
        whole: takes the token through the rest of the layer too, with what ``Attention.step`` is given; gives None
            where it does not.
    """

    attention: Attention
    feed: torch.nn.Module
    number: int
    width: int
    contents: Contents
    whole: Callable[..., torch.Tensor | None] | None = None

    def takes(self, x: torch.Tensor, named: dict) -> bool:
        """Whether the call does what the layer would with these arguments: one token, nothing masked, a plain cache."""
        positions, cache = named.get("position_embeddings"), named.get("past_key_values")
        if x.numel() != self.width or x.dim() != 3 or named.get("attention_mask") is not None or cache is None:
            return False
        if not isinstance(positions, tuple) or (torch.is_grad_enabled() and x.requires_grad):
            return False
        attention, layers = self.attention, getattr(cache, "layers", ())
        if len(layers) <= self.number or type(layer := layers[self.number]) is not DynamicLayer:
            return False
        cosine, sine = positions
        turned = cosine.numel()
        if not turned == sine.numel() <= attention.head or turned % 2 or cosine.dim() != 3:
            return False
        if not x.dtype == cosine.dtype == sine.dtype == attention.dtype or not self.contents.unchanged:
            return False
        return self._room_of(layer) is not None

    def _room_of(self, layer: DynamicLayer) -> Room | None:
        """The room that the layer's keys and values are in, or come into; None where they are of another kind."""
        room = vars(layer).get("cachemoe_room")
        if room is not None and room.goes_on(layer):
            return room
        attention, heads = self.attention, (1, self.attention.kv_heads)
        for each in (layer.keys, layer.values) if layer.is_initialized else (None,):
            if each is None or each.dtype != attention.dtype or each.dim() != 4:
                return None
            if each.shape[:2] != heads or each.shape[3] != attention.head:
                return None
        room = layer.cachemoe_room = Room(layer.keys, layer.values)
        return room

    def __call__(self, x: torch.Tensor, cache, positions: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """``[1, 1, H]``; the token's key and value are in the cache afterwards."""
        layer = cache.layers[self.number]
        room = layer.cachemoe_room
        arguments = *(each.contiguous() for each in (x, *positions)), room.keys, room.values, room.length
        if self.whole is not None and (out := self.whole(*arguments)) is not None:
            room.show(layer)
            return out
        out, normal = self.attention.step(*arguments)
        room.show(layer)
        with ONE_ROW:
            return out + self.feed(normal)


def _step_of(layer: torch.nn.Module) -> Step | None:
    """The layer's parts, if it has them: one attention of four matrices, two norms, and one module more."""
    children = list(layer.children())
    attentions = [m for m in children if all(isinstance(getattr(m, name, None), RoundedLinear) for name in PROJECTIONS)]
    norms = [m for m in children if _norm(m) is not None]
    others = [m for m in children if m not in attentions and m not in norms]
    if (len(attentions), len(norms), len(others)) != (1, 2, 1):
        return None
    (own,), (feed,) = attentions, others
    head, number, scaling = (getattr(own, name, None) for name in ("head_dim", "layer_idx", "scaling"))
    dtype = norms[0].weight.dtype
    if not (isinstance(head, int) and isinstance(number, int) and isinstance(scaling, float)) or dtype not in TOLERANCE:
        return None
    linears = [getattr(own, name) for name in PROJECTIONS]
    inner = [m for name in NORMS if _norm(m := getattr(own, name, None)) is not None]
    matrices = [(linear.rounded, linear.bias) for linear in linears]
    heads, kv_heads = (len(linear.packed) // head for linear in linears[:2])
    of_q, of_k = map(_norm, inner) if len(inner) == len(NORMS) else (None, None)
    attention = Attention(*matrices, *map(_norm, norms), of_q, of_k, heads, kv_heads, scaling, dtype)
    parts = (own, *norms, *linears, *inner)
    parameters = [each for part in parts for each in part.parameters(recurse=False)]
    if not attention.fits or any(each.dtype != dtype for each in parameters):
        return None
    return Step(attention, feed, number, attention.q[0].columns, Contents(*parts, inside=layer))


def _norm(module: torch.nn.Module | None) -> Norm | None:
    """What a module's norm would be, if it is one over the root mean square."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, torch.nn.Parameter) or weight.dim() != 1 or bias is not None:
        return None
    return Norm(weight.detach(), epsilon) if isinstance(epsilon, float) else None


@torch.inference_mode()
def _agrees(layer: torch.nn.Module, step: Step, rotary: torch.nn.Module) -> bool:
    """Whether the step gives what the layer gives, with something simple in place of what follows the attention."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, PROBED + 1, step.attention.q[0].columns, generator=generator).to(step.attention.dtype)
    places, cache = torch.arange(PROBED + 1)[None], DynamicCache()
    cache.layers = [DynamicLayer() for _ in range(step.number + 1)]
    own = vars(step.feed).get("forward")
    step.feed.forward = lambda normal, *_, **__: 0.5 * normal
    try:
        turns = rotary(x, places)

        def named(first: int, end: int) -> dict:
            positions = tuple(each[:, first:end] for each in turns)
            return {"position_ids": places[:, first:end], "position_embeddings": positions, "past_key_values": cache}

        layer(x[:, :PROBED], attention_mask=None, use_cache=True, **named(0, PROBED))
        before = cache.layers[step.number].keys, cache.layers[step.number].values
        last = named(PROBED, PROBED + 1)
        expected = layer(x[:, PROBED:], attention_mask=None, use_cache=True, **last)
        written = cache.layers[step.number].keys[:, :, PROBED:], cache.layers[step.number].values[:, :, PROBED:]
        cache.layers[step.number].keys, cache.layers[step.number].values = before
        if not step.takes(x[:, PROBED:], last):
            return False
        given = step(x[:, PROBED:], cache, last["position_embeddings"])
        mine = cache.layers[step.number].keys[:, :, PROBED:], cache.layers[step.number].values[:, :, PROBED:]
        pairs = zip((expected, *written), (given, *mine), strict=True)
        return all(_near(a, b, TOLERANCE[step.attention.dtype]) for a, b in pairs)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError):  # a layer that is called otherwise
        return False
    finally:
        vars(step.feed).pop("forward", None)
        if own is not None:
            step.feed.forward = own


def _near(expected: torch.Tensor, given: torch.Tensor, tolerance: float) -> bool:
    return bool((given - expected).abs().max() <= tolerance * expected.abs().max())
