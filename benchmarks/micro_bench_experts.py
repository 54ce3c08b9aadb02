"""The experts of one layer, for one token and for a prompt, against what a PyTorch user has without this project.

Every implementation's output is checked before it is timed. Calls rotate over enough experts that no cache holds them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from cachemoe.benchmarks.geometries import GEOMETRIES, Geometry
from cachemoe.benchmarks.micro_figures import Subject, Work
from cachemoe.benchmarks.micro_turns import in_turns
from cachemoe.benchmarks.micro_workload import Case, Workload, check
from cachemoe.benchmarks.timing import plan_round
from cachemoe.kernels.experts import experts
from cachemoe.kernels.formats import FLOATS
from cachemoe.kernels.quantize import unpack_bits

CUDA = torch.cuda.is_available()
PREFILL = 512
DECODE_KINDS = ("bf16", "int8", "int4", "int2")
# A prompt keeps a CPU busy for a second a call: there, only two models' layers.
PREFILL_GEOMETRIES = tuple(GEOMETRIES) if CUDA else ("olmoe", "qwen1.5-moe")
# Compiling takes some 10 s a layer: on a GPU for the finest experts, the coarsest, and those with biases.
COMPILED_GEOMETRIES = ("qwen3-30b-a3b", "gpt-oss-20b", "mixtral-8x7b") if CUDA else ("qwen1.5-moe",)
CASES = [
    *(Case(geometry, kind, 1) for geometry in GEOMETRIES for kind in DECODE_KINDS),
    *(Case(geometry, "bf16", PREFILL) for geometry in PREFILL_GEOMETRIES),
]


@dataclass(frozen=True)
class Implementation:
    """One way to compute the experts.

    Args:
        make: workload -> the function (x, slots, gates) -> y.
        supports: whether it can do a case.
        capturable: whether it can be captured in a CUDA graph, that is never waits for the GPU.
        module: what must be installed for it, besides what the project needs.
    """

    make: Callable[[Workload], Callable]
    supports: Callable[[Case], bool]
    capturable: bool = True
    module: str | None = None


def apply_gate(gate_up: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """SwiGLU, or gpt-oss's clamped form over interleaved columns: ``[..., 2I]`` -> ``[..., I]``."""
    if not geometry.options:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up
    gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def loop(workload: Workload, weights_of: Callable[[int], dict], x, slots, gates) -> torch.Tensor:
    """Expert by expert, as models do it eagerly; ``weights_of`` a slot gives gate_up, down and their biases."""
    y = torch.zeros_like(x)
    for slot in slots.unique().tolist():
        token, k = torch.where(slots == slot)
        w = weights_of(slot)
        h = apply_gate(F.linear(x[token], w["gate_up"], w.get("gate_up_bias")), workload.geometry)
        out = F.linear(h, w["down"], w.get("down_bias")) * gates[token, k, None]
        y.index_add_(0, token, out.to(y.dtype))
    return y


def make_int4_loop(workload: Workload) -> Callable:
    """Expert by expert, through torch's own int4 matmul for CPUs and its packing."""
    group = workload.page_format.group
    packed = {}
    for name in ("gate_up", "down"):
        packed[name] = [
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_bits(weight, 4).int(), 1)
            for weight in workload.weights[name]
        ]
        packed[f"{name}_scales"] = workload.weights[f"{name}_scales"].transpose(1, 2).contiguous()

    def linear(rows, slot, name):
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed[name][slot], group, packed[f"{name}_scales"][slot])
        bias = workload.weights.get(f"{name}_bias")
        return y if bias is None else y + bias[slot].to(y.dtype)

    def run(x, slots, gates):
        y = torch.zeros_like(x)
        for slot in slots.unique().tolist():
            token, k = torch.where(slots == slot)
            h = apply_gate(linear(x[token], slot, "gate_up"), workload.geometry)
            y.index_add_(0, token, (linear(h, slot, "down") * gates[token, k, None]).to(y.dtype))
        return y

    return run


def reference(workload: Workload, x, slots, gates) -> torch.Tensor:
    """``[T, H]`` in float32 arithmetic."""

    def weights_of(slot):
        stored = {name: tensor[slot] for name, tensor in workload.weights.items()}
        floats = {name: workload.page_format.dequantized(stored, name) for name in ("gate_up", "down")}
        return floats | {name: tensor for name, tensor in stored.items() if name.endswith("_bias")}

    return loop(workload, weights_of, x.float(), slots, gates)


def make_cachemoe(workload: Workload) -> Callable:
    return partial(experts, weights=workload.weights, page_format=workload.page_format)


def make_eager_loop(workload: Workload) -> Callable:
    if workload.case.kind == "int4":
        return make_int4_loop(workload)
    rounded = {name: tensor.to(workload.dtype) for name, tensor in workload.weights.items() if name.endswith("_bias")}
    weights = workload.weights | rounded
    return partial(loop, workload, lambda slot: {name: tensor[slot] for name, tensor in weights.items()})


def make_indexed_einsum(workload: Workload) -> Callable:
    """As gpt-fast does it: weights indexed by expert inside one compiled and tuned function, dequantised on the way."""
    page_format, weights = workload.page_format, workload.weights

    def indexed(x, slots, gates):
        w = {name: tensor[slots[0]] for name, tensor in weights.items()}
        gate_up = (page_format.dequantized(w, "gate_up") * x.float()).sum(-1) + w.get("gate_up_bias", 0.0)  # [K, 2I]
        h = apply_gate(gate_up, workload.geometry)
        down = (page_format.dequantized(w, "down") * h[:, None]).sum(-1) + w.get("down_bias", 0.0)  # [K, H]
        return (down * gates[0, :, None]).sum(0, keepdim=True).to(x.dtype)

    return torch.compile(indexed, fullgraph=True, dynamic=False, options={"coordinate_descent_tuning": True})


@use_experts_implementation
class TransformersExperts(torch.nn.Module):
    """The attributes that transformers' experts functions read."""

    def __init__(self, config, workload: Workload):
        super().__init__()
        self.num_experts = len(workload.pages)
        self.gate_up_proj, self.down_proj = (workload.weights[name] for name in ("gate_up", "down"))
        if "gate_up_bias" in workload.weights:
            self.gate_up_proj_bias, self.down_proj_bias = (
                workload.weights[name].to(workload.dtype) for name in ("gate_up_bias", "down_bias")
            )
        self._geometry = workload.geometry

    def _apply_gate(self, gate_up):
        return apply_gate(gate_up, self._geometry)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise NotImplementedError("transformers' decorator dispatches to the chosen implementation")


def make_transformers(name: str, compiled: bool, workload: Workload) -> Callable:
    module = TransformersExperts(SimpleNamespace(_experts_implementation=name), workload)
    module.has_bias = "gate_up_bias" in workload.weights
    forward = partial(ALL_EXPERTS_FUNCTIONS[name], module)
    if compiled:
        forward = torch.compile(forward, fullgraph=True, dynamic=False)
    return lambda x, slots, gates: forward(x, slots, gates.to(x.dtype))


def make_vllm(workload: Workload) -> Callable:
    from vllm.model_executor.layers.fused_moe import fused_experts

    w1, w2 = workload.weights["gate_up"], workload.weights["down"]
    return lambda x, slots, gates: fused_experts(x, w1, w2, gates, slots.int())


def make_sglang(workload: Workload) -> Callable:
    from sglang.srt.layers.moe.fused_moe_triton.fused_moe import fused_experts_impl

    w1, w2 = workload.weights["gate_up"], workload.weights["down"]
    return lambda x, slots, gates: fused_experts_impl(x, w1, w2, gates, slots.int(), inplace=False)


def bf16(case: Case) -> bool:
    return case.kind == "bf16"


def bf16_decode(case: Case) -> bool:
    return case.kind == "bf16" and case.tokens == 1


def compiled_decode(case: Case) -> bool:
    return case.tokens == 1 and case.geometry in COMPILED_GEOMETRIES


def swiglu_on_cuda(case: Case) -> bool:
    return CUDA and case.kind == "bf16" and not GEOMETRIES[case.geometry].options


IMPLEMENTATIONS = {
    "cachemoe": Implementation(make_cachemoe, lambda case: True),
    "eager loop": Implementation(
        make_eager_loop, lambda case: case.kind in FLOATS or (case.kind == "int4" and not CUDA), capturable=False
    ),
    "transformers batched_mm": Implementation(partial(make_transformers, "batched_mm", False), bf16_decode),
    "transformers batched_mm, compiled": Implementation(
        partial(make_transformers, "batched_mm", True), lambda case: bf16_decode(case) and compiled_decode(case)
    ),
    "transformers grouped_mm": Implementation(partial(make_transformers, "grouped_mm", False), bf16),
    "indexed einsum, compiled": Implementation(make_indexed_einsum, compiled_decode),
    "vLLM fused_experts": Implementation(make_vllm, swiglu_on_cuda, module="vllm"),
    "SGLang fused_experts": Implementation(make_sglang, swiglu_on_cuda, module="sglang"),
}
MISSING = [name for name, how in IMPLEMENTATIONS.items() if how.module and find_spec(how.module) is None]


def measured(case: Case) -> list[str]:
    """The implementations that are here and can do a case."""
    return [name for name, how in IMPLEMENTATIONS.items() if name not in MISSING and how.supports(case)]


@pytest.fixture(scope="module", autouse=True)
def say_what_is_missing(session):
    if CUDA and MISSING:
        session.note(f"Not installed, and so not measured: {', '.join(MISSING)}.")


@pytest.mark.parametrize(("case", "repetition", "implementation"), in_turns(((case,) for case in CASES), measured))
def test_experts(measure, device, one_at_a_time, case, repetition, implementation):
    how = IMPLEMENTATIONS[implementation]
    with torch.inference_mode():
        # Rounds are kept by implementation: compiling and capturing once is enough.
        workload, rounds = one_at_a_time(case, lambda: (Workload(case, device), {}))
        if implementation not in rounds:
            run = how.make(workload)
            check(run(*workload.calls[0]), reference(workload, *workload.calls[0]))
            calls = [partial(run, *call) for call in workload.calls]
            rounds[implementation] = plan_round(calls, device, how.capturable)
        subject = Subject("experts", case.geometry, case.tokens, case.kind, implementation)
        measure(subject, Work(workload.bytes(), workload.flops()), repetition, rounds[implementation])
