"""Mamba-3's recurrence (Lahoti et al. 2026, arXiv 2603.15569): trapezoidal updates, rotating maps, several inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.core.declare import op
from ssmkernels.core.steps import step_of
from ssmkernels.core.validate import check_groups, check_range

__all__ = ["mamba3_scan", "mamba3_scan_step"]


def _check(name: str, sizes: dict[str, int], chunk_size: int | None = None, **_: Any) -> None:
    """Groups that divide the heads, two dimensions of the maps for each angle, a chunk of at least one token."""
    check_groups(name, sizes, ("groups", "B", "C", "x"))
    if 2 * sizes["a"] > sizes["n"]:
        raise ValueError(
            f"{name}: `angles` must rotate at most the {sizes['n']} dimensions of `B` and `C`, two for each angle; "
            f"got {sizes['a']} angles"
        )
    check_range(name, 1, chunk_size=chunk_size)


@op(
    shapes="""
        x: b l r h p
        dt A: b l h
        B C: b l r g n
        trap: b l h
        angles: b l a
        B_bias C_bias: h r n
        D: h
        z: b l r h p
        initial_state: s h p n
        initial_angle: s h a
        initial_key: s r h n
        initial_value: s r h p
    """,
    returns="""
        y: b l r h p
        final_state: s h p n: sums if return_final_state
        final_angle: s h a: sums if return_final_state
        final_key: s r h n: sums if return_final_state
        final_value: s r h p: sums if return_final_state
    """,
    wide="dt A trap angles B_bias C_bias D",
    check=_check,
)
def mamba3_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    interleaved: bool = True,
    chunk_size: int | None = None,
    initial_state: Tensor | None = None,
    initial_angle: Tensor | None = None,
    initial_key: Tensor | None = None,
    initial_value: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A linear recurrence with a matrix as the state of each head, an input that counts twice, and maps that rotate.

    With Δ = dt, λ = trap and ω = angles, for each head::

        θ_t = θ_{t-1} + Δ_t ω_t                               within ±π
        k_t = R(θ_t) (B_t + B_bias),  q_t = R(θ_t) (C_t + C_bias)
        h_t = exp(Δ_t A_t) (h_{t-1} + (1 - λ_t) Δ_t Σ_r v_{t-1} k_{t-1}ᵀ) + λ_t Δ_t Σ_r v_t k_tᵀ,   v = x
        y_t = h_t q_t + D x_t,   times silu(z_t)              for each of the r queries

    R turns pairs of a map's dimensions: angle i the dimensions 2i and 2i + 1, or i and i + n/2 (rounded down).

    Sizes: b batch, l length, r rank (the inputs, keys and queries of a step: 1 for SISO), h heads, p head dim, n state
    size, g groups of heads that share B and C, a angles, s sequences (b, or as many as ``cu_seqlens`` packs).

    Args:
        x: the inputs, ``(b, l, r, h, p)``.
        dt: the step size as it is used, at least 0, ``(b, l, h)``.
        A: the decay rate, ``(b, l, h)``; it should be negative.
        B, C: input and output maps, ``(b, l, r, g, n)``; heads i h/g to (i + 1) h/g - 1 use group i.
        trap: how much of an input counts at its own step rather than at the next one, from 0 to 1, ``(b, l, h)``.
        angles: how fast the maps turn, ``(b, l, a)``, for all heads.
        B_bias, C_bias: added to the maps before they are rotated, ``(h, r, n)``.
        D: the skip, a number for each head, ``(h)``.
        z: gates on the outputs, ``(b, l, r, h, p)``.
        interleaved: whether the dimensions of a pair lie side by side; otherwise half of all dimensions apart.
        chunk_size: a hint for implementations in chunks: how many inputs each takes. Results are the same to rounding.
        initial_state: h before the first step, ``(s, h, p, n)``; zero if None, as all of the following.
        initial_angle: θ before the first step, ``(s, h, a)``.
        initial_key: k of the step before the first, ``(s, r, h, n)``.
        initial_value: v of the step before the first, ``(s, r, h, p)``.
        return_final_state: whether to return h, θ, k and v of the last step as well.

    Returns:
        y ``(b, l, r, h, p)`` in x's dtype; with ``return_final_state`` also h ``(s, h, p, n)``, θ ``(s, h, a)``, k
        ``(s, r, h, n)`` and v ``(s, r, h, p)``.
    """


@step_of(mamba3_scan)
def mamba3_scan_step(
    state: Tensor,
    angle: Tensor,
    key: Tensor,
    value: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    interleaved: bool = True,
    implementation: str | None = None,
) -> Tensor:
    """One step of :func:`mamba3_scan`; updates ``state``, ``angle``, ``key`` and ``value`` in place.

    Args:
        state: h, ``(b, h, p, n)``, float32 (float64 for float64 input). Overwritten, as the next three.
        angle: θ, ``(b, h, a)``, likewise.
        key: the last k, ``(b, r, h, n)``, likewise.
        value: the last v, ``(b, r, h, p)``, likewise.
        x, z: ``(b, r, h, p)``.
        dt, A, trap: ``(b, h)``.
        B, C: ``(b, r, g, n)``.
        angles: ``(b, a)``.
        B_bias, C_bias: ``(h, r, n)``.
        D: ``(h)``.
        interleaved: whether the dimensions of a pair lie side by side.

    Returns:
        y ``(b, r, h, p)`` in x's dtype.
    """
