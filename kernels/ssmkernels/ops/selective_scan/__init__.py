"""Mamba's selective scan (Gu and Dao 2023, arXiv 2312.00752, section 3 and algorithm 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.declare import op
from ssmkernels.core.steps import step_of
from ssmkernels.core.validate import check_dtypes, precision

__all__ = ["selective_scan", "selective_scan_step"]


def _check(name: str, sizes: dict[str, int], u: Tensor, A: Tensor, B: Tensor, C: Tensor, **others: Any) -> None:
    """The dtypes of what may be complex, and groups that divide the channels."""
    wide = precision(u)
    complex_wide = torch.complex128 if wide == torch.float64 else torch.complex64
    check_dtypes(name, {"A": A}, dict.fromkeys((wide, u.dtype, complex_wide)))
    check_dtypes(name, {"B": B, "C": C}, dict.fromkeys((u.dtype, wide, *((complex_wide,) if A.is_complex() else ()))))
    states = {key: x for key, x in others.items() if key in ("state", "initial_state")}
    check_dtypes(name, states, [complex_wide if A.is_complex() else wide])
    if sizes.get("g", 1) == 0 or sizes["d"] % sizes.get("g", 1):
        raise ValueError(f"{name}: the {sizes['g']} groups of `B` and `C` must divide the {sizes['d']} channels of `u`")


@op(
    shapes="""
        u delta: b l d
        A: d n
        B C: b l n | b l g n | d n
        D: d
        z: b l d
        delta_bias: d
        initial_state: s d n
    """,
    returns="y: b l d; final_state: s d n: sums A if return_final_state",
    wide="D delta_bias",
    own="A B C initial_state",
    check=_check,
    implementations=("triton", "cpu", "mamba_ssm", "tiled", "reference"),
)
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A linear recurrence over time whose step size and input and output maps depend on the input.

    With Δ = softplus(delta + delta_bias) where asked for, for each channel d and state dimension n::

        h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t
        y_t = Σ_n C_t h_t + D u_t,   times silu(z_t)

    Sizes: b batch, l length, d channels, n state size, g groups of channels that share B and C, s sequences (b, or as
    many as ``cu_seqlens`` packs).

    Args:
        u: the input, ``(b, l, d)``.
        delta: the step size before bias and softplus, ``(b, l, d)``.
        A: the decay rates, ``(d, n)``, real or complex; their real part should be negative. A complex entry stands for
            itself and its conjugate: the output is twice the real part of the sum.
        B, C: input and output maps, ``(b, l, n)`` or ``(b, l, g, n)``, or ``(d, n)`` when fixed; complex only where A
            is.
        D: the skip, ``(d)``.
        z: a gate on the output, ``(b, l, d)``.
        delta_bias: ``(d)``, added to delta.
        delta_softplus: whether Δ passes through softplus.
        initial_state: h before the first step, ``(s, d, n)``; zero if None.
        return_final_state: whether to return h after the last step as well.

    Returns:
        y ``(b, l, d)`` in u's dtype; with ``return_final_state`` also h ``(s, d, n)``, complex where A is.
    """


@step_of(selective_scan, shapes="B C: b n | b g n")
def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    implementation: str | None = None,
) -> Tensor:
    """One token of :func:`selective_scan`; updates ``state`` in place.

    Args:
        state: h, ``(b, d, n)``, float32 (float64 for float64 input), complex where A is. Overwritten.
        u, delta, z: ``(b, d)``.
        A: ``(d, n)``.
        B, C: ``(b, n)`` or ``(b, g, n)``; fixed maps ``(d, n)`` are a group per channel, ``B.expand(b, d, n)``.
        D, delta_bias: ``(d)``.
        delta_softplus: whether Δ passes through softplus.

    Returns:
        y ``(b, d)`` in u's dtype.
    """
