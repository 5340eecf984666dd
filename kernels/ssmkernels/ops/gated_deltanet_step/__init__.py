"""One token of a gated DeltaNet layer (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ssmkernels.core.declare import op

__all__ = ["gated_deltanet_step"]


def _check(name: str, sizes: dict[str, int], beta_scale: float, **_: Any) -> None:
    """Channels that make up heads, and groups of keys that divide them."""
    h, k, v, i, j = (sizes[letter] for letter in "hkvij")
    if k == 0 or i == 0 or i % k or h % (i // k):
        raise ValueError(
            f"{name}: `q_proj` must have g k rows, with k={k} and g groups that divide the {h} heads; got {i}"
        )
    if j != h * v:
        raise ValueError(f"{name}: `v_proj` must have h v = {h * v} rows, for {h} heads of v={v}; got {j}")
    if not 0 <= beta_scale < math.inf:
        raise ValueError(f"{name}: `beta_scale` must be finite and at least 0; got {beta_scale}")


@op(
    shapes="""
        x: b m
        state: b h k v
        q_conv k_conv: i w
        v_conv: j w
        q_state k_state: b w-1 i
        v_state: b w-1 j
        q_proj k_proj: i m
        v_proj g_proj: j m
        b_proj a_proj: h m
        A_log dt_bias: h
        norm_weight: v
        o_proj: m j
    """,
    returns="y: b m",
    wide="q_conv k_conv v_conv A_log dt_bias norm_weight",
    sums="q_state k_state v_state state",
    mutates=("q_state", "k_state", "v_state", "state"),
    check=_check,
    implementations=("cpu", "steps", "reference"),
)
def gated_deltanet_step(
    q_state: Tensor,
    k_state: Tensor,
    v_state: Tensor,
    state: Tensor,
    x: Tensor,
    q_proj: Tensor,
    k_proj: Tensor,
    v_proj: Tensor,
    g_proj: Tensor,
    b_proj: Tensor,
    a_proj: Tensor,
    q_conv: Tensor,
    k_conv: Tensor,
    v_conv: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    o_proj: Tensor,
    *,
    beta_scale: float = 1.0,
    norm_eps: float = 1e-5,
    implementation: str | None = None,
) -> Tensor:
    """One token through a gated DeltaNet layer; updates all four states in place::

        q, k, v = silu(causal_conv1d_step(q_state, q_proj x)), and likewise
        q, k = q / √(Σ q² + 1e-6), k / √(Σ k² + 1e-6), for each head
        o = delta_rule_step(state, q, k, v, beta_scale σ(b_proj x), -exp(A_log) softplus(a_proj x + dt_bias))
        o_proj (rms_norm(o, norm_weight) silu(g_proj x)), a norm for each head

    Sizes: b batch, m width of the layer, h heads of values, k and v head dims, w convolution width, i = g k channels of
    queries and of keys, with g heads that divide h, j = h v channels of values.

    Args:
        q_state, k_state, v_state: the last inputs of the convolutions, ``(b, w-1, i)`` twice and ``(b, w-1, j)``,
            float32 (float64 for float64 input). Overwritten, as ``state`` is.
        state: ``(b, h, k, v)``, likewise.
        x: ``(b, m)``.
        q_proj, k_proj, v_proj, g_proj: ``(i, m)`` twice and ``(j, m)`` twice, in x's dtype.
        b_proj, a_proj: ``(h, m)``.
        q_conv, k_conv, v_conv: ``(i, w)`` twice and ``(j, w)``, in x's dtype or float32 (float64 for float64 input), as
            all up to norm_weight.
        A_log, dt_bias: ``(h)``.
        norm_weight: ``(v)``.
        o_proj: ``(m, j)``, in x's dtype.
        beta_scale: 2 where the transition may have negative eigenvalues.
        norm_eps: added to the mean of squares.

    Returns:
        ``(b, m)`` in x's dtype.
    """
