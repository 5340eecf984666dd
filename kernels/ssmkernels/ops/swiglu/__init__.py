"""The product of a SwiGLU layer's two halves (Shazeer 2020, arXiv 2002.05202), in one pass over memory."""

from __future__ import annotations

from torch import Tensor

from ssmkernels.core.declare import op

__all__ = ["swiglu"]


@op(
    shapes="gate up: ... d",
    returns="y: ... d",
    implementations=("triton", "cpu", "reference"),
)
def swiglu(gate: Tensor, up: Tensor, *, scale: float = 1.0, implementation: str | None = None) -> Tensor:
    """Gates the channels of every position::

        y = silu(scale · gate) · up         where silu(x) = x σ(x)

    Args:
        gate: ``(..., d)``.
        up: shape and dtype of gate. Both may be parts of a wider projection, which are read where they lie.
        scale: a constant factor, as Falcon-H1 has one.

    Returns:
        y ``(..., d)`` in gate's dtype, computed in float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device.
    """
