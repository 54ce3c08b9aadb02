"""Cache-aware routing: the Triton kernel on a GPU, numpy on the CPU, and one operator over both for ``torch.compile``.

The specification is :func:`cachemoe.kernels.reference_route.route`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from cachemoe.kernels.policy import KNOBS, ORIGINAL, Policy
from cachemoe.kernels.route_cpu import route_cpu
from cachemoe.kernels.state import SOFTMAX, GateScores, Misses, Residency, Routing

FUSED_TOKENS = 4  # beyond, reading the router's weight once a token costs more than a launch of its own


def route(
    logits: torch.Tensor,
    state,
    evict: Callable,
    top_k: int,
    policy: Policy = ORIGINAL,
    scores: GateScores = SOFTMAX,
    correction: torch.Tensor | None = None,
    out: Routing | None = None,
) -> Routing:
    """Select experts token by token; each token sees the residency that the tokens before it left.

    On a GPU one launch without synchronisation, which a CUDA graph can capture once it has run. There it is for the
    caller to see to it that every capacity is at least K.

    Args:
        logits: ``[B, T, E]`` float32, float16 or bfloat16.
        state: ``Residency`` of B caches, contiguous and on the logits' device; updated in place.
        evict: eviction policy, as in :mod:`cachemoe.offload.residency`; for ``torch.compile`` one of a module's own, as
            the policy's functions.
        top_k: K.
        policy: its knobs on the logits' device.
        scores: how the model scores and groups its experts.
        correction: ``[E]`` or ``[B, E]`` float32 that only the selection sees (DeepSeek-V3).
        out: contiguous, to be filled in; None for a new one.

    Returns:
        The ``Routing``, as :func:`cachemoe.kernels.reference_route.route` specifies it.

    Raises:
        ValueError: if ``scores`` does not fit E and K, if the state is not contiguous or, on the CPU, if a capacity is
            below K.
    """
    if not torch.compiler.is_compiling():
        _check(logits.shape, state, top_k, policy, scores, correction, out)
        return _route(logits, state, evict, top_k, policy, scores, correction, out)
    out = _output(out, logits.shape, state, top_k, policy, logits.device)
    _route_op(logits, *_op_arguments(state, evict, top_k, policy, scores, correction, out))
    return out


def route_hidden(
    hidden: torch.Tensor,
    router: torch.Tensor,
    state,
    evict: Callable,
    top_k: int,
    policy: Policy = ORIGINAL,
    scores: GateScores = SOFTMAX,
    correction: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
    out: Routing | None = None,
    ticket: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Routing]:
    """``route`` from hidden states: on a GPU and for few tokens in the same launch as the router's matmul.

    Args:
        hidden: ``[B, T, H]`` contiguous.
        router: ``[E, H]`` or ``[B, E, H]`` contiguous.
        logits: ``[B, T, E]`` contiguous, to be filled in, of the dtype that the model's router computes in; None for a
            new one in the hidden states' dtype.
        ticket: ``[B]`` int32 zeros on the GPU, in which the launch counts its programs; it leaves zeros. No two calls
            that may run at the same time can share one. None for a new one, at the price of a second launch.

    Returns:
        The logits and the ``Routing``.

    Raises:
        ValueError: as ``route``, or if what must be contiguous is not.
    """
    if logits is None:
        logits = hidden.new_empty((*hidden.shape[:2], router.shape[-2]))
    if not (hidden.is_contiguous() and router.is_contiguous() and logits.is_contiguous()):
        raise ValueError("the hidden states, the router's weight and the logits must be contiguous")
    if not torch.compiler.is_compiling():
        _check(logits.shape, state, top_k, policy, scores, correction, out)
        return logits, _route_hidden(
            hidden, router, logits, ticket, state, evict, top_k, policy, scores, correction, out
        )
    out = _output(out, hidden.shape, state, top_k, policy, hidden.device)
    _route_hidden_op(
        hidden, router, logits, ticket, *_op_arguments(state, evict, top_k, policy, scores, correction, out)
    )
    return logits, out


def _check(shape, state, top_k, policy, scores, correction, out):
    """What both implementations rely on and can be told without waiting for a GPU."""
    caches, tokens, experts = shape
    scores.check(experts, top_k)
    if state.last_use.shape != (caches, experts * state.layers):
        raise ValueError(f"the state is of {tuple(state.last_use.shape)} experts, the logits {(caches, experts)}")
    if state.page_of.shape[1] < top_k:
        raise ValueError(f"{state.page_of.shape[1]} slots cannot hold the {top_k} experts of one token")
    if not state.is_contiguous:
        raise ValueError("route writes to the state's memory: its tensors must be contiguous")
    if policy.knobs is not None and policy.knobs.shape != (caches, len(KNOBS)):
        raise ValueError(f"the knobs must be {(caches, len(KNOBS))}, not {tuple(policy.knobs.shape)}")
    if policy.table is not None and policy.table.shape != (caches, experts):
        raise ValueError(f"the table must be {(caches, experts)}, not {tuple(policy.table.shape)}")
    if correction is not None and not (
        correction.shape in ((experts,), (caches, experts)) and correction.is_contiguous()
    ):
        raise ValueError(f"the correction must be contiguous and [{experts}] or [{caches}, {experts}]")
    if out is not None:
        asked = () if out.asked is None else (out.asked,)
        right = out.ids.shape == (caches, tokens, top_k) and all(each.shape == out.ids.shape for each in asked)
        if not right or not all(tensor.is_contiguous() for tensor in (*out.tensors(), *asked)):
            raise ValueError(f"out must be contiguous and of {(caches, tokens, top_k)}, not {tuple(out.ids.shape)}")


def _route(logits, state, evict, top_k, policy, scores, correction, out):
    if not logits.is_cuda:
        out = out and _output(out, logits.shape, state, top_k, policy, logits.device)
        return route_cpu(logits, state, evict, top_k, policy, scores, correction, out)
    out = _output(out, logits.shape, state, top_k, policy, logits.device)
    if logits.stride(2) != 1:
        logits = logits.contiguous()
    _plan(logits, state, evict, top_k, policy, scores, correction, out).run()
    return out


@torch.no_grad()
def _route_hidden(hidden, router, logits, ticket, state, evict, top_k, policy, scores, correction, out):
    if not hidden.is_cuda or hidden.shape[1] > FUSED_TOKENS:
        logits.copy_(hidden.to(logits.dtype) @ router.to(logits.dtype).mT)
        return _route(logits, state, evict, top_k, policy, scores, correction, out)
    out = _output(out, hidden.shape, state, top_k, policy, hidden.device)
    if ticket is None:
        ticket = torch.zeros(len(hidden), dtype=torch.int32, device=hidden.device)
    _plan(logits, state, evict, top_k, policy, scores, correction, out, (hidden, router, ticket)).run()
    return out


def _output(out, shape, state, top_k, policy, device):
    """Where the routing goes, with ``asked`` where a policy may not get what it asks for."""
    out = out or Routing.empty(*shape[:2], top_k, device)
    if not (state.levels > 1 or policy.swaps):
        out.asked = None
    elif out.asked is None:
        out.asked = torch.empty_like(out.ids)
    return out


def _plan(*arguments):
    from cachemoe.kernels.route_gpu import plan_route  # here, since not every machine has triton

    return plan_route(*arguments)


def _op_arguments(state, evict, top_k, policy, scores, correction, out):
    """What ``_from_op`` turns back: an operator takes tensors, numbers and strings, and lists of them."""
    if state.expected is not None:
        raise ValueError("torch.compile takes layers that have caches of their own, not one that they share")
    return (
        list(state.tensors().values()),
        state.cheaper,
        list(out.tensors()) + ([] if out.asked is None else [out.asked]),
        _named(evict),
        top_k,
        None if policy.key is None else _named(policy.key),
        None if policy.grade is None else _named(policy.grade),
        *(policy.bounded, policy.knobs, policy.table, policy.swaps, policy.renormalises),
        *(scores.function, scores.groups, scores.top_groups, scores.group_score),
        *(scores.renormalise, scores.epsilon, scores.scale),
        correction,
    )


def _named(function: Callable) -> str:
    return f"{function.__module__}:{function.__name__}"


def _function(named: str) -> Callable:
    module, name = named.split(":")
    return getattr(import_module(module), name)


def _from_op(shape, state, cheaper, out, evict, top_k, key, grade, bounded, knobs, table, swaps, renormalises, *others):
    *scores, correction = others
    state, scores = Residency(*state, cheaper=tuple(cheaper)), GateScores(*scores)
    policy = Policy(key and _function(key), grade and _function(grade), bounded, knobs, table, swaps, renormalises)
    out = Routing(*out[:4], Misses(*out[4:7]), *out[7:])
    _check(shape, state, top_k, policy, scores, correction, out)
    return state, _function(evict), top_k, policy, scores, correction, out


@torch.library.custom_op("cachemoe::route", mutates_args=("state", "out"))
def _route_op(
    logits: torch.Tensor,
    state: list[torch.Tensor],
    cheaper: list[int],
    out: list[torch.Tensor],
    evict: str,
    top_k: int,
    key: str | None,
    grade: str | None,
    bounded: bool,
    knobs: torch.Tensor | None,
    table: torch.Tensor | None,
    swaps: bool,
    renormalises: bool,
    function: str,
    groups: int,
    top_groups: int,
    group_score: str,
    renormalise: bool,
    epsilon: float,
    scale: float,
    correction: torch.Tensor | None,
) -> None:
    of_policy = key, grade, bounded, knobs, table, swaps, renormalises
    scores = function, groups, top_groups, group_score, renormalise, epsilon, scale
    _route(logits, *_from_op(logits.shape, state, cheaper, out, evict, top_k, *of_policy, *scores, correction))


@torch.library.custom_op("cachemoe::route_hidden", mutates_args=("logits", "ticket", "state", "out"))
def _route_hidden_op(
    hidden: torch.Tensor,
    router: torch.Tensor,
    logits: torch.Tensor,
    ticket: torch.Tensor | None,
    state: list[torch.Tensor],
    cheaper: list[int],
    out: list[torch.Tensor],
    evict: str,
    top_k: int,
    key: str | None,
    grade: str | None,
    bounded: bool,
    knobs: torch.Tensor | None,
    table: torch.Tensor | None,
    swaps: bool,
    renormalises: bool,
    function: str,
    groups: int,
    top_groups: int,
    group_score: str,
    renormalise: bool,
    epsilon: float,
    scale: float,
    correction: torch.Tensor | None,
) -> None:
    of_policy = key, grade, bounded, knobs, table, swaps, renormalises
    scores = function, groups, top_groups, group_score, renormalise, epsilon, scale
    arguments = _from_op(logits.shape, state, cheaper, out, evict, top_k, *of_policy, *scores, correction)
    _route_hidden(hidden, router, logits, ticket, *arguments)


@_route_op.register_fake
@_route_hidden_op.register_fake
def _nothing_to_return(*_) -> None:
    return None
