"""Mamba's selective scan (Gu and Dao 2023, arXiv 2312.00752, section 3 and algorithm 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.core.dispatch import Op
from ssmkernels.core.validate import (
    check_cu_seqlens,
    check_dtypes,
    check_options,
    check_parameters,
    check_same_dtype,
    check_shapes,
    check_written,
    copied,
    precision,
)

__all__ = ["selective_scan", "selective_scan_step"]


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
        cu_seqlens: int32 ``(s + 1)``, borders of sequences packed one after another in a batch of one.
        implementation: force one by name; the fastest that can run this call if None.

    Returns:
        y ``(b, l, d)`` in u's dtype; with ``return_final_state`` also h ``(s, d, n)``, float32 (float64 for float64
        input), complex where A is. Sums and states are kept in that precision whatever the input's.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, by name.
    """
    sizes = check_shapes(
        "selective_scan",
        {
            "u": (u, "b l d"),
            "delta": (delta, "b l d"),
            "A": (A, "d n"),
            "B": (B, "b l n | b l g n | d n"),
            "C": (C, "b l n | b l g n | d n"),
            "D": (D, "d"),
            "z": (z, "b l d"),
            "delta_bias": (delta_bias, "d"),
        },
        ("u", "delta", "A", "B", "C"),
    )
    cu_seqlens = copied(cu_seqlens)
    s = check_cu_seqlens("selective_scan", cu_seqlens, u)
    check_shapes("selective_scan", {"u": (u, "b l d"), "initial_state": (initial_state, "s d n")}, s=s, **sizes)
    check_options("selective_scan", "bool", delta_softplus=delta_softplus, return_final_state=return_final_state)
    _check_values("selective_scan", sizes, u, delta, A, B, C, D, z, delta_bias, initial_state, "initial_state")
    y, final_state = _SCAN(
        implementation,
        u=u,
        delta=delta,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
    return (y, final_state) if return_final_state else y


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
        implementation: force one by name.

    Returns:
        y ``(b, d)`` in u's dtype.

    Raises:
        TypeError, ValueError: as :func:`selective_scan`.
    """
    sizes = check_shapes(
        "selective_scan_step",
        {
            "u": (u, "b d"),
            "delta": (delta, "b d"),
            "A": (A, "d n"),
            "B": (B, "b n | b g n"),
            "C": (C, "b n | b g n"),
            "D": (D, "d"),
            "z": (z, "b d"),
            "delta_bias": (delta_bias, "d"),
            "state": (state, "b d n"),
        },
        ("u", "delta", "A", "B", "C", "state"),
    )
    check_options("selective_scan_step", "bool", delta_softplus=delta_softplus)
    _check_values("selective_scan_step", sizes, u, delta, A, B, C, D, z, delta_bias, state, "state")
    check_written("selective_scan_step", "state", state)
    return _STEP(
        implementation,
        state=state,
        u=u,
        delta=delta,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
    )


def _check_values(
    op: str,
    sizes: dict[str, int],
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor | None,
    state_name: str,
) -> None:
    """The rules that shapes alone do not tell: dtypes, and groups that divide the channels."""
    check_same_dtype(op, {"u": u, "delta": delta, "z": z})
    check_parameters(op, u, {"D": D, "delta_bias": delta_bias})
    wide = precision(u)
    complex_wide = torch.complex128 if wide == torch.float64 else torch.complex64
    check_dtypes(op, {"A": A}, dict.fromkeys((wide, u.dtype, complex_wide)))
    check_dtypes(op, {"B": B, "C": C}, dict.fromkeys((u.dtype, wide, *((complex_wide,) if A.is_complex() else ()))))
    check_dtypes(op, {state_name: state}, [complex_wide if A.is_complex() else wide])
    if sizes.get("g", 1) == 0 or sizes["d"] % sizes.get("g", 1):
        raise ValueError(f"{op}: the {sizes['g']} groups of `B` and `C` must divide the {sizes['d']} channels of `u`")


def _fake(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    s = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.promote_types(precision(u), A.dtype)
    return torch.empty_like(u, memory_format=torch.contiguous_format), u.new_empty((s, *A.shape), dtype=dtype)


_SCAN = Op(
    "selective_scan",
    __name__,
    ("triton", "cpu", "mamba_ssm", "tiled", "reference"),
    fake=_fake,
    batched={"u": 3, "delta": 3, "B": 3, "C": 3, "z": 3, "initial_state": 3},
)
_STEP = Op(
    "selective_scan_step",
    __name__,
    ("triton", "cpu", "reference"),
    batched={"u": 2, "delta": 2, "B": 2, "C": 2, "z": 2, "state": 3},
)
