"""Mamba-2's scan, where the package has it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssmkernels.compat._calls import compatible
from ssmkernels.compat._split import split_scan
from ssmkernels.compat.mamba_ssm import mamba_chunk_scan_combined

__all__ = ["mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"]


@compatible(split_scan)
def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int | None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's layer from its first projection on: convolution, scan, gated norm and second projection.

    Sizes: b batch, l length, h heads of p channels, d = h p, g groups, n states, w width of the convolution.

    Args:
        zxbcdt: ``(b, l, 2 m + 2 d + 2 g n + h)``: two inputs of m channels for a SwiGLU beside the layer, whose output
            stands before the layer's, m mostly 0; then the gate z; x, B and C; and Δ.
        conv1d_weight: ``(d + 2 g n, w)``, of the convolution of x, B and C.
        conv1d_bias: ``(d + 2 g n)``.
        dt_bias, A: ``(h)``; Δ + dt_bias passes through softplus.
        D: ``(h)`` or ``(h, p)``.
        chunk_size, initial_states, seq_idx, dt_limit, return_final_states: as :func:`mamba_chunk_scan_combined`.
        activation: of the convolution.
        rmsnorm_weight: ``(d)``, of an RMSNorm with the gate, over the channels of each group; if None, the output is
            multiplied by silu(z).
        rmsnorm_eps: added to its mean of squares.
        outproj_weight, outproj_bias: ``(o, m + d)`` and ``(o)``, of the second projection.
        headdim: p, where D does not tell it.
        ngroups: g.
        norm_before_gate: norm(y) · silu(z) rather than norm(y · silu(z)).
        state_dtype: has no effect: states between chunks are float32 (float64).

    Returns:
        ``(b, l, m + d)``, or ``(b, l, o)`` with a second projection; with ``return_final_states`` also the states
        ``(b, h, p, n)``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, by name.
    """
