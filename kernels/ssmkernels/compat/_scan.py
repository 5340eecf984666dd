"""What the scans of :mod:`ssmkernels.compat.mamba_ssm` do: the package's layout into ours and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import causal_conv1d, rms_norm, selective_scan
from ssmkernels.compat._again import Again
from ssmkernels.compat._dtypes import beside, together
from ssmkernels.core.validate import check_options, check_shapes, precision


def scan(
    op: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
    implementation: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`ssmkernels.compat.mamba_ssm.selective_scan_fn`; ``op`` is what errors call it."""
    sizes = check_shapes(op, {"u": (u, "b d l"), "delta": (delta, "b d l"), "A": (A, "d n")}, ("u", "delta", "A"))
    others = {"D": (D, "d"), "z": (z, "b d l"), "delta_bias": (delta_bias, "d")}
    check_shapes(op, {"u": (u, "b d l"), **_shapes(A, B, C), **others}, ("B", "C"), **sizes)
    check_options(op, "bool", delta_softplus=delta_softplus, return_last_state=return_last_state)
    dtype = together(u, delta, z)
    x = u.transpose(1, 2).to(dtype)
    y, last = selective_scan(
        x,
        delta.transpose(1, 2).to(dtype),
        beside(A, x),
        _time_major(B, A, x),
        _time_major(C, A, x),
        beside(D, x),
        None if z is None else z.transpose(1, 2).to(dtype),
        beside(delta_bias, x),
        delta_softplus,
        return_final_state=True,
        implementation=implementation,
    )
    y = y.transpose(1, 2).to(u.dtype)
    return (y, last) if return_last_state else y


def inner(
    op: str,
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
    delta_softplus: bool,
    *,
    checkpoint_lvl: int = 0,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
    implementation: str | None,
) -> Tensor:
    """As :func:`ssmkernels.compat.mamba_ssm.mamba_inner_fn`; ``op`` is what errors call it."""
    weights = {
        "A": (A, "d n"),
        "xz": (xz, "b 2d l"),
        "conv1d_weight": (conv1d_weight, "d 1 w"),
        "x_proj_weight": (x_proj_weight, "rows d"),
        "delta_proj_weight": (delta_proj_weight, "d r"),
        "out_proj_weight": (out_proj_weight, "o d"),
    }
    sizes = check_shapes(op, weights, weights)
    r, n = sizes["r"], sizes["n"]
    mapped = 2 * n if A.is_complex() else n  # of B and of C, in the projection
    others = {
        "conv1d_bias": (conv1d_bias, "d"),
        "out_proj_bias": (out_proj_bias, "o"),
        **_shapes(A, B, C),
        "D": (D, "d"),
        "delta_bias": (delta_bias, "d"),
        "B_proj_bias": (B_proj_bias, "2n" if A.is_complex() else "n"),
        "C_proj_bias": (C_proj_bias, "2n" if A.is_complex() else "n"),
        "b_rms_weight": (b_rms_weight, "n"),
        "c_rms_weight": (c_rms_weight, "n"),
        "dt_rms_weight": (dt_rms_weight, "d"),
    }
    check_shapes(op, {"xz": (xz, "b 2d l"), **others}, **sizes)
    rows = r + mapped * ((B is None) + (C is None))
    if sizes["rows"] < rows:
        raise ValueError(f"{op}: `x_proj_weight` must have {rows} rows here; got {tuple(x_proj_weight.shape)}")
    check_options(op, "bool", delta_softplus=delta_softplus)
    check_options(op, "int", checkpoint_lvl=checkpoint_lvl)
    check_options(op, "number", b_c_dt_rms_eps=b_c_dt_rms_eps)
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"{op}: `checkpoint_lvl` must be 0 or 1; got {checkpoint_lvl}")
    _check_map(op, "B", A, B, B_proj_bias, b_rms_weight)
    _check_map(op, "C", A, C, C_proj_bias, c_rms_weight)

    x, z = xz.transpose(1, 2).chunk(2, dim=-1)  # (b l d)
    conv_weight, conv_bias = beside(conv1d_weight[:, 0], x), beside(conv1d_bias, x)

    def normed(t: Tensor, weight: Tensor) -> Tensor:
        found: Any = rms_norm(t, beside(weight, t), eps=b_c_dt_rms_eps, implementation=implementation)
        return found

    def convolved() -> Tensor:
        y: Any = causal_conv1d(x, conv_weight, conv_bias, "silu", implementation=implementation)
        return y

    def stepped(projected: Tensor) -> Tensor:
        return F.linear(projected[..., :r], delta_proj_weight.to(projected.dtype)).to(x.dtype)  # (b l d)

    def once_more() -> list[Tensor]:
        delta = stepped(projected)
        return [convolved(), delta] if dt_rms_weight is None else [convolved(), delta, normed(delta, dt_rms_weight)]

    def map_of(given: Tensor | None, rows: slice, bias: Tensor | None, weight: Tensor | None) -> Tensor:
        if given is not None:
            t = _time_major(given, A, x)
        else:
            t = projected[..., rows]
            t = (t if bias is None else t + bias.to(t.dtype)).to(x.dtype)
            t = _complex(t.unflatten(-1, (n, 2)), x) if A.is_complex() else t  # (b l n)
        return t if weight is None else normed(t, weight)

    with Again(checkpoint_lvl == 1, once_more) as again:
        u = again.leave(convolved())
        projected = F.linear(u, x_proj_weight)  # (b l r+n+n)
        delta = again.leave(stepped(projected))
        normed_delta = delta if dt_rms_weight is None else again.leave(normed(delta, dt_rms_weight))
        y: Any = selective_scan(
            u,
            normed_delta,
            beside(A, x),
            map_of(B, slice(r, r + mapped), B_proj_bias, b_rms_weight),
            map_of(C, slice(sizes["rows"] - mapped, None), C_proj_bias, c_rms_weight),
            beside(D, x),
            z,
            beside(delta_bias, x),
            delta_softplus,
            implementation=implementation,
        )
    return F.linear(y, out_proj_weight, None if out_proj_bias is None else out_proj_bias.to(out_proj_weight.dtype))


def _shapes(A: Tensor, B: Tensor | None, C: Tensor | None) -> dict[str, tuple[Any, str]]:
    """Which shapes B and C may have beside A."""
    shape = "d n | b n 2l | b g n 2l" if A.is_complex() else "d n | b n l | b g n l"
    return {"B": (B, shape), "C": (C, shape)}


def _check_map(
    op: str, name: str, A: Tensor, given: Tensor | None, bias: Tensor | None, rms_weight: Tensor | None
) -> None:
    """What B or C cannot be together with."""
    if given is not None and bias is not None:
        raise ValueError(f"{op}: `{name}_proj_bias` belongs to a projected `{name}`; leave it away where that is given")
    if rms_weight is not None and (A.is_complex() or (given is not None and given.ndim == 2)):
        what = "complex `A`" if A.is_complex() else f"a `{name}` that is fixed"
        raise ValueError(f"{op}: there is no `{name.lower()}_rms_weight` with {what}")


def _time_major(t: Tensor, A: Tensor, x: Tensor) -> Tensor:
    """B or C as the package has it → (d n), (b l n) or (b l g n), complex where the time axis has both parts."""
    if t.ndim == 2:
        return beside(t, x)
    t = t.movedim(-1, 1)
    return _complex(t.unflatten(1, (-1, 2)).movedim(2, -1), x) if A.is_complex() else beside(t, x)


def _complex(t: Tensor, x: Tensor) -> Tensor:
    """(..., 2) → (...), complex64, or complex128 beside a float64 ``x``."""
    return torch.complex(*t.to(torch.promote_types(t.dtype, precision(x))).unbind(-1))
