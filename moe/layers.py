"""The MoE layers of a model: found, checked against page formats, and their routers asked."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature

import torch
import torch.nn.functional as F

from cachemoe.kernels.activations import activate
from cachemoe.kernels.formats import PageFormat
from cachemoe.moe.routers import RouterOutput, RoutingRule, find_rule
from cachemoe.moe.shape import MoeShape
from cachemoe.offload.errors import InputError

ROUTERS = ("gate", "router")  # what MoE blocks call theirs
DEVIATIONS = -3, 3.6  # of logits in the probes, powers of two: beyond, float32 loses the scores of some in a softmax
PROBES = 128  # random hidden states that tell a router's rule, and rows that tell an activation


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer of a model.

    Args:
        block: the module around both.
        experts: whose forward goes through transformers' experts interface.
        router: None where the block has none of a known name: its routing then cannot be changed.
    """

    block: torch.nn.Module
    experts: torch.nn.Module
    router: torch.nn.Module | None

    @property
    def count(self) -> int:
        """E."""
        return self.experts.num_experts


def moe_layers(model) -> list[MoeLayer]:
    """The model's MoE layers, in order.

    Raises:
        InputError: if it has none, or none that other experts can be put into.
    """
    layers = []
    for block in model.modules():
        for experts in (child for child in block.children() if is_experts(child)):
            routers = (getattr(block, name, None) for name in ROUTERS)
            layers.append(MoeLayer(block, experts, next(filter(None, routers), None)))
    if not layers:
        raise InputError(f"{type(model).__name__} has no experts that go through transformers' experts interface")
    return layers


def check_count(model, layers: list[MoeLayer], shape: MoeShape) -> None:
    """Whether a model has as many MoE layers and experts as its experts' weights.

    Raises:
        InputError: if not.
    """
    if len(layers) != len(shape.layers) or any(layer.count != shape.experts for layer in layers):
        raise InputError(
            f"{type(model).__name__} has {len(layers)} MoE layers of {layers[0].count} experts, and its checkpoint "
            f"{len(shape.layers)} of {shape.experts}"
        )


@contextmanager
def recorded_routers(model) -> Iterator[list[list[RouterOutput]]]:
    """While it is open, what each MoE layer's router answers is appended to the layer's list.

    Raises:
        InputError: as ``moe_layers``, or if a layer has no router of its own.
    """
    layers = moe_layers(model)
    if any(layer.router is None for layer in layers):
        raise InputError(f"{type(model).__name__} has MoE blocks without a router of their own to record")
    answers = [[] for _ in layers]

    def recorder(seen, experts):
        return lambda router, arguments, answer: seen.append(RouterOutput.of(answer, experts))

    hooks = [
        layer.router.register_forward_hook(recorder(seen, layer.count))
        for layer, seen in zip(layers, answers, strict=True)
    ]
    try:
        yield answers
    finally:
        for hook in hooks:
            hook.remove()


def is_experts(module: torch.nn.Module) -> bool:
    """Whether transformers' experts interface has decorated the module's class."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "_apply_gate", "num_experts"))


@torch.inference_mode()
def check_experts(layer: MoeLayer, page_format: PageFormat) -> None:
    """Whether the model computes its experts as the page format says: the activation is asked, on random rows.

    Raises:
        InputError: if not.
    """
    experts, name = layer.experts, type(layer.experts).__name__
    own = (experts.has_gate, experts.has_bias, getattr(experts, "has_post_expert_norm", False))
    if own != (page_format.gated, page_format.bias, False):
        raise InputError(f"{name} has experts with (gate, bias, norm) = {own}, which its pages here have not")
    sizes = tuple(experts.down_proj.shape[1:][:: -1 if experts.is_transposed else 1])
    if sizes != (page_format.hidden, page_format.intermediate):
        raise InputError(f"{name} has matrices of another shape than its checkpoint: see moe/architectures.py")
    rows = torch.randn(PROBES, 2 * page_format.intermediate, generator=torch.Generator().manual_seed(0))
    rows *= torch.logspace(-1, 2, PROBES)[:, None]  # small values show the curve, large ones where it is cut off
    if not torch.allclose(experts._apply_gate(rows), activate(rows, page_format), rtol=1e-4, atol=1e-5):
        raise InputError(f"{name} has an activation that cachemoe does not compute: see moe/architectures.py")


def gates_of(layers: list[MoeLayer]) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Of each layer what gives its router's logits for any hidden states ``[S, H]``.

    Raises:
        InputError: if a router's logits are more than a product with its weight.
    """
    gates = []
    for layer in layers:
        if (logits_of := probe(layer).logits_of) is None:
            raise InputError(
                f"{type(layer.router).__name__} does more than multiply by its weight, so that it cannot be asked "
                "ahead of its layer: use another routing than pregated, and no prefetch"
            )
        gates.append(partial(logits_of, layer.router))
    return gates


def router_marks(layers: list[MoeLayer]) -> list[tuple]:
    """What tells whether routers, or the blocks around them, have been changed: another mark is another router."""
    return [tuple(_mark(module) for module in (layer.router, layer.block)) for layer in layers]


def _mark(module: torch.nn.Module) -> tuple:
    """Its identity, its numbers, and its tensors, with how often each was written to."""
    plain = tuple((n, v) for n, v in sorted(vars(module).items()) if isinstance(v, (bool, int, float, str)))
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    written = tuple((n, id(t), -1 if t.is_inference() else t._version) for n, t in tensors)
    return id(module), plain, written


@dataclass(frozen=True)
class Probe:
    """What a router does with random hidden states.

    Args:
        output: its answer.
        logits_of: (router, ``[T, H]``) -> the same logits without the rest of its work; None if they are not a plain
            product with its weight.
    """

    output: RouterOutput
    logits_of: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor] | None


def routing_rules(layers: list[MoeLayer], top_k: int, device: torch.device | str | None = None) -> list[RoutingRule]:
    """The rule of each MoE layer's router.

    Args:
        layers: as ``moe_layers`` gives them.
        top_k: K that the model's config says.
        device: where the logits will be: ``cpu`` where the host routes; None: where the routers are.

    Raises:
        InputError: as ``probe``, or if cachemoe knows no rule that a router follows, or one chooses other than K.
    """
    rules: list[RoutingRule] = []
    for layer in layers:
        likely = rules[-1].scores if rules else None  # a model's layers follow one rule
        # As it is, and in float32, where rounding hides nothing.
        outputs = [probe(layer).output, probe(layer, precisely=True).output]
        if (chosen := outputs[0].ids.shape[1]) != top_k:
            raise InputError(
                f"{type(layer.router).__name__} chooses {chosen} experts, and the model's config says {top_k}"
            )
        rules.append(find_rule(layer.router, layer.block, outputs, likely).to(device or outputs[0].logits.device))
    return rules


@torch.inference_mode()
def probe(layer: MoeLayer, precisely: bool = False) -> Probe:
    """Ask a layer's router, with small and with large hidden states: what is cut off shows in large logits alone.

    Args:
        precisely: ask a float32 copy of the router.

    Raises:
        InputError: if there is none, or it answers otherwise than with logits, weights and ids.
    """
    router = layer.router
    if router is None:
        raise InputError(f"{type(layer.block).__name__} has no router of its own to put another in: use exact routing")
    try:
        if precisely:
            router = copy.deepcopy(router).float()
        weight = max(router.parameters(), key=torch.Tensor.numel)
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(PROBES, weight.shape[-1], generator=generator).to(weight)
        # What the block passes besides is its own, under the same name.
        parameters = list(signature(router.forward).parameters.values())[1:]
        named = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
        more = [getattr(layer.block, name, None) for name in named]
        if precisely:
            more = [each.float() if torch.is_tensor(each) and each.is_floating_point() else each for each in more]
        ordinary = RouterOutput.of(router(hidden, *more), layer.count).logits.float().std(dim=1).mean()
        deviations = torch.logspace(*DEVIATIONS, PROBES // 2, base=2, device=hidden.device)
        deviations = torch.cat((deviations, deviations[-1:].expand(PROBES // 2)))  # half of them as large as can be
        hidden = (hidden.float() * (deviations / ordinary.clamp(min=1e-3))[:, None]).to(hidden.dtype)
        answer = router(hidden, *more)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise InputError(
            f"{type(router).__name__} is called in a way of its own, so that cachemoe cannot ask it for its rule: use "
            "exact routing"
        ) from error
    output = RouterOutput.of(answer, layer.count)
    for logits_of in (_product, _float_product):
        if isinstance(getattr(router, "weight", None), torch.Tensor):
            logits = logits_of(router, hidden)
            if logits.dtype == output.logits.dtype and torch.equal(logits, output.logits):
                return Probe(output, logits_of)
    return Probe(output, None)


def _product(router: torch.nn.Module, seen: torch.Tensor) -> torch.Tensor:
    return F.linear(seen.to(router.weight.dtype), router.weight, getattr(router, "bias", None))


def _float_product(router: torch.nn.Module, seen: torch.Tensor) -> torch.Tensor:
    bias = getattr(router, "bias", None)
    return F.linear(seen.float(), router.weight.float(), None if bias is None else bias.float())
