"""A model's own routing rule, found by asking its router: which of the known rules gives what it gives."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from cachemoe.kernels import reference_route
from cachemoe.kernels.policy import ORIGINAL, Policy
from cachemoe.kernels.reference_route import gate_scores
from cachemoe.kernels.route import route
from cachemoe.kernels.route_batch import route_batch
from cachemoe.kernels.state import SOFTMAX, GateScores, Routing
from cachemoe.offload.errors import InputError

ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-5}  # relative, of what a router computes; in 16 bits ``COARSE``
COARSE = 2e-2
PERTURBATIONS = 8  # draws of logits as far off as rounding may take them
EPSILON = 1e-20  # DeepSeek-V3's, to the sum of weights


@dataclass(frozen=True)
class RoutingRule:
    """What ``route`` needs to choose in a model's place, and what it leaves to the model.

    Args:
        scores: how logits become scores, groups and weights.
        correction: ``[E]`` float32 that only the selection sees, or None.
        weigh: (``[T, E]`` float32 logits, ``[T, K]`` ids) -> ``[T, K]`` gate weights, where they are no function of
            scores; None where they are.
    """

    scores: GateScores
    correction: torch.Tensor | None = None
    weigh: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def to(self, device: torch.device | str) -> "RoutingRule":
        """The rule for logits on another device."""
        return self if self.correction is None else replace(self, correction=self.correction.to(device))


@dataclass(frozen=True)
class RouterOutput:
    """A router's answer for T tokens, whatever order its class returns it in.

    Args:
        logits: ``[T, E]``. weights: ``[T, K]``. ids: ``[T, K]``.
        order: name of each of the answer's tensors.
    """

    logits: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    order: tuple[str, ...]

    @classmethod
    def of(cls, answer: tuple[torch.Tensor, ...], experts: int) -> "RouterOutput":
        """Tell the tensors of a router's answer apart by what they are.

        Raises:
            InputError: if they are not logits, weights and ids.
        """
        names = []
        for tensor in answer if isinstance(answer, tuple) else ():
            if not tensor.is_floating_point():
                names.append("ids")
            else:
                names.append("logits" if tensor.shape[-1] == experts and "logits" not in names else "weights")
        if sorted(names) != ["ids", "logits", "weights"]:
            raise InputError("the model's routers do not answer with logits, weights and ids: use exact routing")
        return cls(**dict(zip(names, answer, strict=True)), order=tuple(names))

    def to(self, device: torch.device | str) -> "RouterOutput":
        return RouterOutput(*(each.to(device) for each in (self.logits, self.weights, self.ids)), order=self.order)

    def like(self, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Another answer, in this one's order and dtypes, on the device of ``logits``."""
        new = {
            "logits": logits,
            "weights": weights.to(logits.device, self.weights.dtype),
            "ids": ids.to(logits.device),
        }
        return tuple(new[name] for name in self.order)


def find_rule(
    router: torch.nn.Module, block: torch.nn.Module, outputs: Sequence[RouterOutput], likely: GateScores | None = None
) -> RoutingRule:
    """The rule that gives what the router gave, for every token; for logits on the CPU.

    Args:
        router: the module; its attributes say how many groups there are, what factor the weights have, and so on.
        block: the MoE block around it, which in some models has the correction.
        outputs: of the router on random hidden states.
        likely: scores of the rule to try first.

    Raises:
        InputError: if no known rule does.
    """
    experts, outputs = outputs[0].logits.shape[1], [output.to("cpu") for output in outputs]
    for rule in sorted(_candidates(router, block, experts), key=lambda rule: rule.scores != likely):
        if all(_explains(rule, output) for output in outputs):
            return rule
    raise InputError(
        f"{type(router).__name__} follows a routing rule that cachemoe does not know, so that no other routing can "
        "stay true to its weights: use exact routing, or add the rule to moe/routers.py"
    )


def choose(
    rule: RoutingRule,
    logits: torch.Tensor,
    state,
    evict: Callable,
    top_k: int,
    policy: Policy = ORIGINAL,
    out: Routing | None = None,
) -> Routing:
    """``route`` by a model's rule.

    Args:
        rule: for the logits' device.
        logits: ``[B, T, E]``, where the state is; or of several sequences that share a state of one cache, as for
            ``route_batch``.
        state, evict, top_k, policy, out: as for ``route``; no ``out`` for sequences that share a cache.
    """
    how = evict, top_k, policy, rule.scores, rule.correction
    if len(logits) > len(state.clock):
        routing = route_batch(logits, state, *how)
    else:
        routing = route(logits, state, *how, out)
    if rule.weigh is not None:
        weights = rule.weigh(logits.float().flatten(0, 1), routing.ids.flatten(0, 1))
        routing.weights.copy_(weights.view_as(routing.weights).masked_fill(routing.slots < 0, 0.0))
    return routing


def own_choice(rule: RoutingRule, logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``[T, K]`` ids and weights that a model of that rule chooses by itself, for logits ``[T, E]``."""
    ids, weights = reference_route.own_choice(logits, top_k, rule.scores, rule.correction)
    return ids, weights if rule.weigh is None else rule.weigh(logits.float(), ids)


def _explains(rule: RoutingRule, output: RouterOutput) -> bool:
    """Whether the rule chooses and weighs as the router did, but for rounding and ties.

    A router computes in its own precision, and among equals takes any. So its choice is explained by experts of the
    same scores; or, since a group of experts can win by as little, by what the rule would choose if rounding had gone
    otherwise. Of a token that is not explained so no more than that is known: the rule is another.
    """
    logits, top_k = output.logits.float(), output.ids.shape[1]
    precision = max(ROUNDING.get(tensor.dtype, COARSE) for tensor in (output.logits, output.weights))
    try:
        rule.scores.check(logits.shape[1], top_k)
    except ValueError:  # groups that E and K do not fit
        return False
    scores = gate_scores(logits, rule.scores)
    values = scores if rule.correction is None else scores + rule.correction
    least = 0.0 if rule.correction is None else values.abs().amax(1, keepdim=True)

    def alike(ids: torch.Tensor) -> torch.Tensor:
        """``[T]`` whether experts of the same scores as the router's are chosen."""
        ours, theirs = (values.gather(1, each).sort(1).values for each in (ids, output.ids))
        return ((ours - theirs).abs() <= precision * torch.maximum(ours.abs(), theirs.abs()).clamp(min=least)).all(1)

    ids, weights = own_choice(rule, logits, top_k)
    explained = alike(ids)
    generator = torch.Generator().manual_seed(0)
    for _ in range(PERTURBATIONS):
        if explained.all():
            break
        noise = torch.empty_like(logits).uniform_(-precision, precision, generator=generator)
        explained |= alike(own_choice(rule, logits * (1 + noise), top_k)[0])
    ours, theirs = ids.sort(1), output.ids.sort(1)
    same = (ours.values == theirs.values).all(1)
    weights, expected = weights.gather(1, ours.indices), output.weights.float().gather(1, theirs.indices)
    close = ((weights - expected).abs() <= precision * expected.abs().amax(1, keepdim=True)).all(1)
    # Where ties are as frequent as half of the tokens, there is too little to go by.
    return bool(explained.all() and close[same].all() and 2 * same.sum() >= len(same))


def _candidates(router: torch.nn.Module, block: torch.nn.Module, experts: int) -> Iterator[RoutingRule]:
    """Rules that the router's attributes allow, the more particular first."""
    jitter = getattr(router, "router_jitter_noise", None)
    if jitter is not None:
        yield RoutingRule(SOFTMAX, weigh=partial(sparsemixer_weights, jitter=jitter))
    corrections = [tensor.float().cpu() for tensor in _corrections(router, block) if tensor.numel() == experts]
    groups = [(1, 1, "best")]
    count, chosen = (_first(router, *names) for names in (("num_group", "n_group"), ("topk_group",)))
    if count and chosen and count > 1:
        groups = [(count, chosen, "best-two"), (count, chosen, "best"), *groups]
    scales = dict.fromkeys((float(_first(router, "routed_scaling_factor", "route_scale") or 1.0), 1.0))
    for correction in (*corrections, None):
        for function in ("softmax", "sigmoid"):
            for grouping in groups:
                for renormalise in (False, True):
                    for scale in scales:
                        scores = GateScores(function, *grouping, renormalise, EPSILON if renormalise else 0.0, scale)
                        yield RoutingRule(scores, correction)


def _corrections(router: torch.nn.Module, block: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Tensors that only the selection may see, by their names (DeepSeek-V3's and its descendants')."""
    for module in (router, block):
        for name, tensor in (*module.named_buffers(), *module.named_parameters()):
            if name.rpartition(".")[2] in ("e_score_correction_bias", "expert_bias"):
                yield tensor.detach().flatten()


def _first(router: torch.nn.Module, *names: str):
    """The first attribute that there is; None without."""
    return next((value for name in names if (value := getattr(router, name, None)) is not None), None)


def sparsemixer_weights(logits: torch.Tensor, ids: torch.Tensor, jitter: float) -> torch.Tensor:
    """Phi-3.5-MoE's gate weights (SparseMixer, arXiv 2409.12136): each expert's share among those not much below it.

    Of the experts not yet chosen, those whose logit is below the chosen one's by more than 2 * jitter of the larger
    magnitude drop out; the weight is the chosen one's softmax among the others. The model chooses the best each time;
    for another expert the rule is the same, with that one in the best one's place.

    Args:
        logits: ``[T, E]`` float32.
        ids: ``[T, K]`` chosen experts, in order.
        jitter: ``router_jitter_noise``.

    Returns:
        ``[T, K]`` float32.
    """
    left, weights = logits, []
    for chosen in ids.split(1, dim=1):
        value = logits.gather(1, chosen)
        below = (value - logits) / logits.abs().clamp(min=value) > 2 * jitter
        weights.append(left.masked_fill(below, float("-inf")).softmax(1).gather(1, chosen))
        left = left.scatter(1, chosen, float("-inf"))
    return torch.cat(weights, 1)
