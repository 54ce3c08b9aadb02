"""Load transformers models, and swap routing and experts into them. The only file that imports transformers."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from types import MethodType

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from transformers.integrations.moe import ExpertsInterface

from cachemoe.kernels.activations import activate
from cachemoe.kernels.formats import PageFormat
from cachemoe.kernels.reference import Routing
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.routers import RouterOutput, RoutingRule, find_rule
from cachemoe.offload.errors import InputError

RouteLayer = Callable[[int, torch.Tensor, torch.Tensor], Routing]
PlaceLayer = Callable[[int, torch.Tensor, torch.Tensor], Routing]
RunExperts = Callable[[int, torch.Tensor, Routing], torch.Tensor]

ROUTERS = ("gate", "router")  # what MoE blocks call theirs
_IMPLEMENTATION = "cachemoe"
RESIDENT_EXPERTS = "grouped_mm"
PROBES = 64  # random hidden states that tell a router's rule
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_model(path: str | os.PathLike, dtype: torch.dtype = torch.float32):
    """A causal language model from a local folder of safetensors, whole, for inference on the CPU.

    Raises:
        InputError: if transformers cannot load it, or a tensor is missing.
    """
    with _readable_errors(path):
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            experts_implementation=RESIDENT_EXPERTS,
        )
    _check_complete(path, loading)
    return model.eval().requires_grad_(False)


def load_without_experts(checkpoint: Checkpoint, device: torch.device | str = "cpu"):
    """The model of a checkpoint, its experts' parameters on the ``meta`` device, all others read once.

    Nothing of an expert is read or allocated: a ``Swap`` has to compute them.

    Raises:
        InputError: if transformers does not know the model or lets nothing else compute its experts, or if a tensor is
            missing.
    """
    with _readable_errors(checkpoint.path):
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=False
        )
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # of the experts alone, as Checkpoint has made sure
        model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if model_class is None:
            raise InputError(f"transformers has no causal language model for {type(config).__name__}")
        tensors = checkpoint.tensors
        dense = {name: tensors.read(name) for name in tensors.entries if not checkpoint.is_expert(name)}
        model, loading = _hollow(model_class).from_pretrained(
            None, config=config, state_dict=dense, dtype="auto", output_loading_info=True
        )
        model.__class__ = model_class
        model.to(device)
        if (checkpoint.path / "generation_config.json").exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(
                checkpoint.path, local_files_only=True
            )
    _check_complete(checkpoint.path, loading)
    for experts in _experts_of(model):
        for name, shape in experts.__dict__.pop("_hollow").items():
            parameter = torch.nn.Parameter(torch.empty(shape, device="meta", dtype=model.dtype), requires_grad=False)
            experts.register_parameter(name, parameter)
    model.name_or_path = model.config.name_or_path = str(checkpoint.path)
    return model.eval().requires_grad_(False)


def load_tokenizer(path: Path):
    """The checkpoint's tokenizer; None where it has none.

    Raises:
        InputError: if transformers cannot load it.
    """
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        return None
    with _readable_errors(path):
        return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def static_cache(model, length: int):
    """A key-value cache of fixed size, for ``DecodeGraph``: room for ``length`` tokens at addresses that stay."""
    return transformers.StaticCache(config=model.config, max_cache_len=length)


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
        for experts in (child for child in block.children() if _is_experts(child)):
            routers = (getattr(block, name, None) for name in ROUTERS)
            layers.append(MoeLayer(block, experts, next(filter(None, routers), None)))
    if not layers:
        raise InputError(f"{type(model).__name__} has no experts that go through transformers' experts interface")
    return layers


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


def text_streamer(tokenizer):
    """Prints what ``generate`` generates as it comes, without the prompt."""
    return transformers.TextStreamer(tokenizer, skip_prompt=True)


@torch.inference_mode()
def check_experts(layer: MoeLayer, page_format: PageFormat, transposed: bool | None) -> None:
    """Whether the model computes its experts as the page format says: the activation is asked, on random rows.

    Args:
        transposed: whether the matrices were stored, and read, as ``[in, out]``; None where the model's own form says
            nothing about that.

    Raises:
        InputError: if not.
    """
    experts, name = layer.experts, type(layer.experts).__name__
    own = (experts.has_gate, experts.has_bias, getattr(experts, "has_post_expert_norm", False))
    if own != (page_format.gated, page_format.bias, False):
        raise InputError(f"{name} has experts with (gate, bias, norm) = {own}, which its pages here have not")
    sizes = tuple(experts.down_proj.shape[1:][:: -1 if experts.is_transposed else 1])
    if sizes != (page_format.hidden, page_format.intermediate) or transposed not in (None, experts.is_transposed):
        raise InputError(f"{name} has matrices of another shape than its checkpoint: see moe/architectures.py")
    rows = 4 * torch.randn(PROBES, 2 * page_format.intermediate, generator=torch.Generator().manual_seed(0))
    if not torch.allclose(experts._apply_gate(rows), activate(rows, page_format), rtol=1e-4, atol=1e-5):
        raise InputError(f"{name} has an activation that cachemoe does not compute: see moe/architectures.py")


class Swap:
    """While it is open, a model's experts run through ``experts``, and its routers choose through ``route``.

    A context manager; leaving it gives the model its own routers and experts back.

    Args:
        model: as ``load_model`` or ``load_without_experts`` gives it.
        route: (MoE layer, ``[S, E]`` router logits of S = B * T tokens, ``[S, H]`` what the router saw) -> ``Routing``.
            None: the model's own routers choose, bit for bit.
        experts: (MoE layer, ``[S, H]`` hidden states, the layer's ``Routing``) -> ``[S, H]``; None: the model's own.
        place: (MoE layer, ``[S, K]`` ids, ``[S, K]`` weights) -> ``Routing``, of what the model's own routers chose;
            needed by ``experts`` where there is no ``route``.

    Raises:
        InputError: if the model has no MoE layer that this can be done to.
    """

    def __init__(
        self,
        model,
        route: RouteLayer | None,
        experts: RunExperts | None = None,
        place: PlaceLayer | None = None,
    ):
        self._model = model
        self.layers = moe_layers(model)
        self._route, self._experts, self._place = route, experts, place
        self._probes = [] if route is None else [probe(layer) for layer in self.layers]

    @property
    def routers(self) -> list[torch.Tensor]:
        """``[E, H]``, each MoE layer's router weight."""
        return [layer.router.weight for layer in self.layers]

    def __enter__(self):
        self._routing: dict[int, tuple[Routing, torch.Tensor]] = {}  # and the ids that the router answered
        self._own_forward = [vars(layer.router).get("forward") for layer in self.layers if self._route is not None]
        for number, layer in enumerate(self.layers):
            if self._route is not None:
                # The instance's forward, not its class: hooks that look for the router's type keep working.
                forward = partial(self._route_tokens, number, self._probes[number], layer.router.forward)
                layer.router.forward = MethodType(forward, layer.router)
            if self._experts is not None:
                layer.experts.cachemoe_run = partial(self._run_experts, number)
        if self._experts is not None:
            self._own_experts = self._model.get_experts_implementation()
            self._model.set_experts_implementation(_IMPLEMENTATION)
        return self

    def __exit__(self, *_):
        if self._experts is not None:
            self._model.set_experts_implementation(self._own_experts)
        for layer in self.layers:
            if self._route is not None:
                del layer.router.forward
                if (forward := self._own_forward.pop(0)) is not None:  # another swap's, around this one
                    layer.router.forward = forward
            if self._experts is not None:
                del layer.experts.cachemoe_run

    def _route_tokens(self, number: int, known: "Probe", own, router, hidden_states, *arguments, **options):
        """What the router's forward returns, with other experts."""
        seen = hidden_states.reshape(-1, hidden_states.shape[-1])
        if known.logits_of is not None:
            logits = known.logits_of(router, seen)
        else:
            logits = RouterOutput.of(own(hidden_states, *arguments, **options), known.output.logits.shape[1]).logits
        routing = self._route(number, logits, seen)
        answer = known.output.like(logits, routing.weights.flatten(0, 1), routing.ids.flatten(0, 1))
        self._routing[number] = routing, answer[known.output.order.index("ids")]
        return answer

    def _run_experts(self, number: int, hidden_states, ids, weights) -> torch.Tensor:
        if self._route is None:
            return self._experts(number, hidden_states, self._place(number, ids, weights))
        routing, answered = self._routing[number]
        if ids is not answered and not torch.equal(ids, answered):
            raise RuntimeError("the experts are called with other ids than the layer's router answered")
        return self._experts(number, hidden_states, routing)


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


def routing_rules(model) -> list[RoutingRule]:
    """The rule of each MoE layer's router.

    Raises:
        InputError: as ``probe``, or if cachemoe knows no rule that a router follows.
    """
    rules: list[RoutingRule] = []
    for layer in moe_layers(model):
        likely = rules[-1].scores if rules else None  # a model's layers follow one rule
        rules.append(find_rule(layer.router, layer.block, probe(layer).output, likely))
    return rules


@torch.inference_mode()
def probe(layer: MoeLayer) -> Probe:
    """Ask a layer's router.

    Raises:
        InputError: if there is none, or it answers otherwise than with logits, weights and ids.
    """
    router = layer.router
    if router is None:
        raise InputError(f"{type(layer.block).__name__} has no router of its own to put another in: use exact routing")
    weight = max(router.parameters(), key=torch.Tensor.numel)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(PROBES, weight.shape[-1], generator=generator).to(weight)
    # What the block passes besides is its own, under the same name.
    more = [name for name, p in signature(router.forward).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    output = RouterOutput.of(router(hidden, *(getattr(layer.block, name, None) for name in more)), layer.count)
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


def _is_experts(module: torch.nn.Module) -> bool:
    """Whether transformers' experts interface has decorated the module's class."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "_apply_gate", "num_experts"))


def _experts_of(model) -> list[torch.nn.Module]:
    return [module for module in model.modules() if _is_experts(module)]


def _hollow(model_class: type) -> type:
    """The model class, its experts without parameters: none is allocated, none is missed."""

    def __init__(self, config, *arguments, **options):
        model_class.__init__(self, config, *arguments, **options)
        for experts in _experts_of(self):
            experts._hollow = {name: parameter.shape for name, parameter in experts.named_parameters()}
            for name in experts._hollow:
                delattr(experts, name)
            experts._is_hf_initialized = True  # or transformers would want to fill what is not there

    # transformers reads the source of a class's module to see what it supports.
    return type(model_class.__name__, (model_class,), {"__init__": __init__, "__module__": model_class.__module__})


@contextmanager
def _readable_errors(path) -> Iterator[None]:
    """What transformers raises, in one sentence; and no progress bars."""
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"transformers cannot load {path}: {reason}") from error


def _check_complete(path, loading: dict) -> None:
    """transformers fills what is missing with random numbers and goes on."""
    if absent := sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"]):
        raise InputError(f"{path} lacks {len(absent)} of the model's tensors, {absent[0]} first: get it again")


def _experts_forward(experts, hidden_states, top_k_index, top_k_weights):
    """transformers' experts interface."""
    return experts.cachemoe_run(hidden_states, top_k_index, top_k_weights)


ExpertsInterface.register(_IMPLEMENTATION, _experts_forward)
