"""The experts of six published models: what the microbenchmarks and the payloads take their sizes from.

From each model's ``config.json`` on Hugging Face.
"""

from dataclasses import dataclass

from cachemoe.kernels.formats import GROUPED, PageFormat

GROUP = 64  # the largest that divides every model's H and I


@dataclass(frozen=True)
class Geometry:
    """One model's MoE layers.

    Args:
        title: the model's name.
        hidden: H.
        intermediate: I, of one routed expert.
        experts: E of a layer.
        top_k: K.
        layers: MoE layers.
        options: ``PageFormat``'s fields in which its experts differ from SwiGLU without biases.
    """

    title: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    layers: int
    options: tuple[tuple[str, object], ...] = ()

    def page_format(self, kind: str) -> PageFormat:
        """Layout of one expert's page."""
        group = GROUP if kind in GROUPED else 0
        return PageFormat(kind, self.hidden, self.intermediate, group, **dict(self.options))


GPT_OSS = (("activation", "clamped-swiglu"), ("bias", True), ("interleaved", True))

GEOMETRIES = {
    "qwen3-30b-a3b": Geometry("Qwen3-30B-A3B", 2048, 768, experts=128, top_k=8, layers=48),
    "olmoe": Geometry("OLMoE-1B-7B", 2048, 1024, experts=64, top_k=8, layers=16),
    "qwen1.5-moe": Geometry("Qwen1.5-MoE-A2.7B", 2048, 1408, experts=60, top_k=4, layers=24),
    "deepseek-v2-lite": Geometry("DeepSeek-V2-Lite", 2048, 1408, experts=64, top_k=6, layers=26),
    "gpt-oss-20b": Geometry("gpt-oss-20b", 2880, 2880, experts=32, top_k=4, layers=24, options=GPT_OSS),
    "mixtral-8x7b": Geometry("Mixtral-8x7B", 4096, 14336, experts=8, top_k=2, layers=32),
}
