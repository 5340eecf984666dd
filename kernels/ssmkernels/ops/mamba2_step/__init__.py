"""One token of a Mamba-2 layer (Dao and Gu 2024, arXiv 2405.21060, section 7 and figure 6)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ssmkernels.core.declare import op
from ssmkernels.core.validate import check_range

__all__ = ["mamba2_step"]


def _check(
    name: str, sizes: dict[str, int], dt_limit: Any, norm_weight: Tensor | None, norm_groups: int, **_: Any
) -> None:
    """Channels that make up heads, groups that divide them, and projections that fit."""
    h, p, n, c, e, f = (sizes[letter] for letter in "hpncef")
    d = h * p
    groups = (c - d) // (2 * n) if n else 0
    if groups < 1 or c != d + 2 * groups * n or h % groups:
        raise ValueError(
            f"{name}: `conv_state` must have h p + 2 g n channels, with g groups that divide the {h} heads of p={p} "
            f"and n={n}; got {c}"
        )
    if f < d:
        raise ValueError(f"{name}: `out_proj` must have at least h p = {d} columns; got {f}")
    if e != 2 * (f - d) + d + c + h:
        wanted = 2 * (f - d) + d + c + h
        raise ValueError(
            f"{name}: `in_proj` must have {wanted} rows, for the columns of `out_proj`, {f}, the channels of "
            f"`conv_state`, {c}, and {h} heads; got {e}"
        )
    if norm_weight is not None and norm_weight.shape[0] != d:
        raise ValueError(f"{name}: `norm_weight` must have shape (h p), ({d}); got {tuple(norm_weight.shape)}")
    check_range(name, 1, norm_groups=norm_groups)
    if d % norm_groups:
        raise ValueError(f"{name}: `norm_groups` must divide the {d} channels of all heads; got {norm_groups}")
    low, high = dt_limit
    if not low <= high:
        raise ValueError(f"{name}: `dt_limit` must be (least, most) with least <= most; got {dt_limit!r}")


@op(
    shapes="""
        x: b m
        ssm_state: b h p n
        conv_weight: c w
        conv_state: b w-1 c
        conv_bias: c
        A_log dt_bias: h
        D: h | h p
        norm_weight: d
        in_proj: e m
        in_bias: e
        out_proj: m f
        out_bias: m
    """,
    returns="y: b m",
    wide="conv_weight conv_bias dt_bias A_log D norm_weight",
    sums="conv_state ssm_state",
    mutates=("conv_state", "ssm_state"),
    check=_check,
    implementations=("cpu", "steps", "reference"),
)
def mamba2_step(
    conv_state: Tensor,
    ssm_state: Tensor,
    x: Tensor,
    in_proj: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor | None,
    out_proj: Tensor,
    out_bias: Tensor | None,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    norm_groups: int = 1,
    norm_before_gate: bool = False,
    norm_eps: float = 1e-5,
    implementation: str | None = None,
) -> Tensor:
    """One token through a Mamba-2 layer; updates both states in place::

        k, v, z, xBC, δ = in_proj x + in_bias
        x, B, C = silu(causal_conv1d_step(conv_state, xBC))
        y = ssd_step(ssm_state, x, softplus(δ + dt_bias) within dt_limit, -exp(A_log), B, C, D)
        y = norm(y · silu(z)), or norm(y) · silu(z) with norm_before_gate, or y · silu(z) without a norm_weight
        out_proj [silu(k) · v, y] + out_bias

    Sizes: b batch, m width of the layer, h heads, p head dim, n state size, g groups of heads that share B and C, w
    convolution width, c = h p + 2 g n channels of the convolution, f - h p channels of the MLP beside the heads, which
    are k's and v's (often none), e = 2 (f - h p) + h p + c + h.

    Args:
        conv_state: the last inputs, ``(b, w-1, c)``, float32 (float64 for float64 input). Overwritten.
        ssm_state: ``(b, h, p, n)``, likewise. Overwritten.
        x: ``(b, m)``.
        in_proj, in_bias: ``(e, m)`` and ``(e)``, in x's dtype; rows for k, v, z, x, B, C and δ.
        conv_weight: ``(c, w)``, in x's dtype or float32 (float64 for float64 input), as all up to norm_weight.
        conv_bias: ``(c)``.
        dt_bias: ``(h)``.
        A_log: ``(h)``; A is minus its exponential.
        D: the skip, ``(h)`` or ``(h, p)``.
        norm_weight: ``(h p)``; no norm if None.
        out_proj, out_bias: ``(m, f)`` and ``(m)``, in x's dtype.
        dt_limit: the least and the most that Δ may be.
        norm_groups: the mean of squares is taken over so many groups of neighbouring channels.
        norm_before_gate: whether the norm comes before the gate.
        norm_eps: added to the mean of squares.

    Returns:
        ``(b, m)`` in x's dtype.
    """
