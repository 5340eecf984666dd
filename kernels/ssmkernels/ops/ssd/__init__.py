"""Mamba-2's state-space dual (Dao and Gu 2024, arXiv 2405.21060, sections 3 and 6)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ssmkernels.core.declare import op
from ssmkernels.core.steps import step_of
from ssmkernels.core.validate import check_groups, check_range

__all__ = ["ssd", "ssd_step"]


def _check(name: str, sizes: dict[str, int], dt_limit: Any, chunk_size: int | None = None, **_: Any) -> None:
    """Groups that divide the heads, limits in order, and a chunk of at least one token."""
    check_groups(name, sizes, ("groups", "B", "C", "x"))
    low, high = dt_limit
    if not low <= high:
        raise ValueError(f"{name}: `dt_limit` must be (least, most) with least <= most; got {dt_limit!r}")
    check_range(name, 1, chunk_size=chunk_size)


@op(
    shapes="""
        x: b l h p
        dt: b l h
        A: h
        B C: b l g n
        D: h | h p
        z: b l h p
        dt_bias: h
        initial_state: s h p n
    """,
    returns="y: b l h p; final_state: s h p n: sums if return_final_state",
    wide="A D dt_bias",
    check=_check,
    implementations=("triton", "cpu", "mamba_ssm", "tiled", "reference"),
)
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk_size: int | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A linear recurrence over time with a matrix as the state of each head and a single decay for all of it.

    With Δ = dt + dt_bias, through softplus where asked for, then clamped to dt_limit, for each head::

        h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ
        y_t = h_t C_t + D x_t,   times silu(z_t)

    Sizes: b batch, l length, h heads, p head dim, n state size, g groups of heads that share B and C, s sequences (b,
    or as many as ``cu_seqlens`` packs).

    Args:
        x: the input, ``(b, l, h, p)``.
        dt: the step size before bias, softplus and limits, ``(b, l, h)``.
        A: the decay rates, ``(h)``; they should be negative.
        B, C: input and output maps, ``(b, l, g, n)``; heads i h/g to (i + 1) h/g - 1 use group i.
        D: the skip, a number for each head ``(h)`` or for each channel ``(h, p)``.
        z: a gate on the output, ``(b, l, h, p)``.
        dt_bias: ``(h)``, added to dt.
        dt_softplus: whether Δ passes through softplus.
        dt_limit: the least and the most that Δ may be. Where Δ is limited, dt and dt_bias get no gradient.
        chunk_size: a hint for implementations in chunks: how many tokens each takes. Results are the same to rounding.
        initial_state: h before the first step, ``(s, h, p, n)``; zero if None.
        return_final_state: whether to return h after the last step as well.

    Returns:
        y ``(b, l, h, p)`` in x's dtype; with ``return_final_state`` also h ``(s, h, p, n)``, float32 (float64 for
        float64 input).
    """


@step_of(ssd)
def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    implementation: str | None = None,
) -> Tensor:
    """One token of :func:`ssd`; updates ``state`` in place.

    Args:
        state: h, ``(b, h, p, n)``, float32 (float64 for float64 input). Overwritten.
        x, z: ``(b, h, p)``.
        dt: ``(b, h)``.
        A, dt_bias: ``(h)``.
        B, C: ``(b, g, n)``.
        D: ``(h)`` or ``(h, p)``.
        dt_softplus: whether Δ passes through softplus.
        dt_limit: the least and the most that Δ may be.

    Returns:
        y ``(b, h, p)`` in x's dtype.
    """
