"""The gates of the real-gated linear recurrent unit (De et al. 2024, arXiv 2402.19427, section 2.4)."""

from __future__ import annotations

from torch import Tensor

from ssmkernels.core.declare import op

__all__ = ["rglru_gates"]


@op(
    shapes="""
        x: b l h p
        gates: b l h 2p
        log_decay: h p
        first: b l
    """,
    returns="a: b l h p: sums; b: b l h p",
    wide="log_decay",
    int32="first",
    implementations=("triton", "cpu", "reference"),
)
def rglru_gates(
    x: Tensor,
    gates: Tensor,
    log_decay: Tensor,
    first: Tensor | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The decay and the input of the recurrence h_t = a_t h_{t-1} + b_t, each channel from its own gates::

        r_t, i_t = gates_t                              the recurrence gate's logits, and then the input gate's
        a_t = exp(log_decay · σ(r_t))
        b_t = √(1 - a_t²) · σ(i_t) · x_t                without the root where ``first`` is 1

    so that h has the variance of its input. 1 - a² is computed without cancellation where a is close to 1. The
    derivative of the root is cut off at 1000, as it is infinite where a is 1.

    Sizes: b batch, l length, h heads, p channels of a head.

    Args:
        x: ``(b, l, h, p)``.
        gates: logits, ``(b, l, h, 2p)``: those of the recurrence gate of a head, and then those of its input gate.
        log_decay: ``(h, p)``, at most 0: the logarithm of the decay with an open gate, -8 softplus(Λ) in the paper. In
            x's dtype, or float32 (float64 for float64 input).
        first: int32 ``(b, l)``, 1 at the first token of a sequence, where there is no state to make room for, and 0 at
            all others; None where no token is the first.

    Returns:
        a ``(b, l, h, p)``, in float32 (float64 for float64 input), and b ``(b, l, h, p)`` in x's dtype.
    """
