"""What tells one MoE architecture from another: a table for each thing that differs.

A model that names its experts as one of these does, and computes SwiGLU, needs no line here.
"""

from dataclasses import dataclass

# config.json's names for one thing.
TOP_K = ("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "top_k_experts")
EXPERTS_A_LAYER = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# ``hidden_act`` -> the page format's activation.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}


@dataclass(frozen=True)
class Naming:
    """Names of a layer's expert tensors in a checkpoint, after ``...layers.N.``; ``{}`` is the expert's number.

    Args:
        gate, up, down: matrices of one expert, ``[I, H]``, ``[I, H]`` and ``[H, I]``.
        gate_up: instead of gate and up, both in one.
        blocks: whether there are mxfp4 ``_blocks`` and ``_scales`` in the tensors' place.

    Without ``{}`` a tensor holds all experts of its layer: its first dimension is theirs.
    """

    down: str
    gate: str = ""
    up: str = ""
    gate_up: str = ""
    blocks: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The names that there are, of gate, up, gate_up and down."""
        return tuple(part for part in (self.gate, self.up, self.gate_up, self.down) if part)


NAMINGS = (
    # Qwen, OLMoE, DeepSeek, GLM and most others.
    Naming(gate="experts.{}.gate_proj.weight", up="experts.{}.up_proj.weight", down="experts.{}.down_proj.weight"),
    # Mixtral, Phi-3.5-MoE, MiniMax, LFM2.
    Naming(gate="experts.{}.w1.weight", up="experts.{}.w3.weight", down="experts.{}.w2.weight"),
    # gpt-oss, and models saved as transformers holds them.
    Naming(gate_up="experts.gate_up_proj", down="experts.down_proj"),
    Naming(gate_up="experts.gate_up_proj", down="experts.down_proj", blocks=True),
    # Granite.
    Naming(gate_up="block_sparse_moe.input_linear.weight", down="block_sparse_moe.output_linear.weight"),
)


@dataclass(frozen=True)
class Experts:
    """How a model's experts differ from SwiGLU by ``hidden_act``, without biases, gate before up.

    Args:
        interleaved: gate and up rows in turns.
        activation: a name of the page format's; empty: the config's.
        constants: values that the config must have, since the activation has them built in.
    """

    interleaved: bool = False
    activation: str = ""
    constants: tuple[tuple[str, float], ...] = ()


EXPERTS = {
    "gpt_oss": Experts(
        interleaved=True,
        activation="clamped-swiglu",
        constants=(("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)),
    ),
}
"""``model_type`` -> its experts; any other model has plain ones."""
PLAIN = Experts()
