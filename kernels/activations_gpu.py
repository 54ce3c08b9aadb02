"""``activations`` in Triton."""

import triton
import triton.language as tl


@triton.jit
def activate_tile(gate, up, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """``activations.activate`` of float32 tiles; without a gate, ``gate`` is not looked at."""
    if ACTIVATION == "clamped-swiglu":
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0)
        result = gate * tl.sigmoid(1.702 * gate) * (up + 1.0)
    else:
        z = gate if GATED else up
        if ACTIVATION == "silu":
            result = z * tl.sigmoid(z)
        elif ACTIVATION == "gelu":
            result = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
        else:
            result = tl.maximum(z, 0.0)
        if GATED:
            result *= up
    return result
