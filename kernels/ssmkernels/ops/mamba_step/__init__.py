"""One token of a Mamba layer (Gu and Dao 2023, arXiv 2312.00752, figure 3)."""

from __future__ import annotations

from torch import Tensor

from ssmkernels.core.declare import op

__all__ = ["mamba_step"]


@op(
    shapes="""
        x: b m
        conv_weight: d w
        conv_state: b w-1 d
        conv_bias: d
        A_log: d n
        ssm_state: b d n
        dt_proj: d r
        dt_bias D: d
        out_proj: m d
        out_bias: m
        in_proj: 2d m
        in_bias: 2d
        x_proj: r+2n d
    """,
    returns="y: b m",
    wide="conv_weight conv_bias dt_bias A_log D",
    sums="conv_state ssm_state",
    mutates=("conv_state", "ssm_state"),
    implementations=("cpu", "steps", "reference"),
)
def mamba_step(
    conv_state: Tensor,
    ssm_state: Tensor,
    x: Tensor,
    in_proj: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_proj: Tensor,
    out_bias: Tensor | None,
    *,
    norm_eps: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """One token through a Mamba layer; updates both states in place::

        x, z = in_proj x + in_bias
        x = silu(causal_conv1d_step(conv_state, x))
        δ, B, C = x_proj x,        each over its root mean square with a norm_eps (FalconMamba)
        y = selective_scan_step(ssm_state, x, softplus(dt_proj δ + dt_bias), -exp(A_log), B, C, D) · silu(z)
        out_proj y + out_bias

    Sizes: b batch, m width of the layer, d channels inside, n state size, w convolution width, r rank of Δ.

    Args:
        conv_state: the last inputs, ``(b, w-1, d)``, float32 (float64 for float64 input). Overwritten.
        ssm_state: ``(b, d, n)``, likewise. Overwritten.
        x: ``(b, m)``.
        in_proj, in_bias: ``(2d, m)`` and ``(2d)``, in x's dtype; rows for x, then for z.
        conv_weight: ``(d, w)``, in x's dtype or float32 (float64 for float64 input).
        conv_bias: ``(d)``, likewise.
        x_proj: ``(r + 2n, d)``, in x's dtype; rows for Δ, B and C.
        dt_proj: ``(d, r)``, in x's dtype.
        dt_bias: ``(d)``, in x's dtype or float32 (float64 for float64 input), as A_log and D.
        A_log: ``(d, n)``; A is minus its exponential.
        D: the skip, ``(d)``.
        out_proj, out_bias: ``(m, d)`` and ``(m)``, in x's dtype.
        norm_eps: added to the mean of squares of Δ, B and C, which are not normalised if None.

    Returns:
        ``(b, m)`` in x's dtype.
    """
