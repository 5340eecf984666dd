"""What the scans of :mod:`ssmkernels.compat.mamba_ssm` do: the package's layout into ours and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import causal_conv1d, rms_norm, selective_scan
from ssmkernels.compat._again import Again
from ssmkernels.compat._dtypes import beside, together
from ssmkernels.core.validate import REAL, check_dtypes, check_options, check_shapes, precision


def scan(a: Any) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`ssmkernels.compat.mamba_ssm.selective_scan_fn`."""
    first = {"u": (a.u, "b d l"), "delta": (a.delta, "b d l"), "A": (a.A, "d n")}
    sizes = check_shapes(a.op, first, first)
    others = {"D": (a.D, "d"), "z": (a.z, "b d l"), "delta_bias": (a.delta_bias, "d")}
    check_shapes(a.op, {"u": (a.u, "b d l"), **_shapes(a), **others}, ("B", "C"), **sizes)
    check_options(a.op, "bool", delta_softplus=a.delta_softplus, return_last_state=a.return_last_state)
    check_dtypes(a.op, {"u": a.u, "delta": a.delta, "z": a.z}, REAL)
    dtype = together(a.u, a.delta, a.z)
    x = a.u.transpose(1, 2).to(dtype)
    y, last = selective_scan(
        x,
        a.delta.transpose(1, 2).to(dtype),
        beside(a.A, x),
        _time_major(a.B, a.A, x),
        _time_major(a.C, a.A, x),
        beside(a.D, x),
        None if a.z is None else a.z.transpose(1, 2).to(dtype),
        beside(a.delta_bias, x),
        a.delta_softplus,
        return_final_state=True,
        implementation=a.implementation,
    )
    y = y.transpose(1, 2).to(a.u.dtype)
    return (y, last) if a.return_last_state else y


def inner(a: Any) -> Tensor:
    """As :func:`ssmkernels.compat.mamba_ssm.mamba_inner_fn`."""
    sizes = _check_inner(a)
    r, n, mapped = sizes["r"], sizes["n"], _mapped(a)
    x, z = a.xz.transpose(1, 2).chunk(2, dim=-1)  # (b l d)
    conv_weight, conv_bias = beside(a.conv1d_weight[:, 0], x), beside(a.conv1d_bias, x)

    def normed(t: Tensor, weight: Tensor) -> Tensor:
        found: Any = rms_norm(t, beside(weight, t), eps=a.b_c_dt_rms_eps, implementation=a.implementation)
        return found

    def convolved() -> Tensor:
        y: Any = causal_conv1d(x, conv_weight, conv_bias, "silu", implementation=a.implementation)
        return y

    def stepped(projected: Tensor) -> Tensor:
        return F.linear(projected[..., :r], a.delta_proj_weight.to(projected.dtype)).to(x.dtype)  # (b l d)

    def once_more() -> list[Tensor]:
        delta = stepped(projected)
        return [convolved(), delta, *([] if a.dt_rms_weight is None else [normed(delta, a.dt_rms_weight)])]

    def map_of(given: Tensor | None, rows: slice, bias: Tensor | None, weight: Tensor | None) -> Tensor:
        if given is not None:
            t = _time_major(given, a.A, x)
        else:
            t = projected[..., rows]
            t = (t if bias is None else t + bias.to(t.dtype)).to(x.dtype)
            t = _complex(t.unflatten(-1, (n, 2)), x) if a.A.is_complex() else t  # (b l n)
        return t if weight is None else normed(t, weight)

    with Again(a.checkpoint_lvl == 1, once_more) as again:
        u = again.leave(convolved())
        projected = F.linear(u, a.x_proj_weight)  # (b l r+n+n)
        delta = again.leave(stepped(projected))
        normed_delta = delta if a.dt_rms_weight is None else again.leave(normed(delta, a.dt_rms_weight))
        y: Any = selective_scan(
            u,
            normed_delta,
            beside(a.A, x),
            map_of(a.B, slice(r, r + mapped), a.B_proj_bias, a.b_rms_weight),
            map_of(a.C, slice(sizes["rows"] - mapped, None), a.C_proj_bias, a.c_rms_weight),
            beside(a.D, x),
            z,
            beside(a.delta_bias, x),
            a.delta_softplus,
            implementation=a.implementation,
        )
    bias = None if a.out_proj_bias is None else a.out_proj_bias.to(a.out_proj_weight.dtype)
    return F.linear(y, a.out_proj_weight, bias)


def _check_inner(a: Any) -> dict[str, int]:
    """Checks the arguments of :func:`inner`; returns the size of every letter."""
    needed = {
        "A": "d n",
        "xz": "b 2d l",
        "conv1d_weight": "d 1 w",
        "x_proj_weight": "rows d",
        "delta_proj_weight": "d r",
        "out_proj_weight": "o d",
    }
    sizes = check_shapes(a.op, {name: (getattr(a, name), shape) for name, shape in needed.items()}, needed)
    optional = {
        "conv1d_bias": "d",
        "out_proj_bias": "o",
        "D": "d",
        "delta_bias": "d",
        "B_proj_bias": "2n" if a.A.is_complex() else "n",
        "C_proj_bias": "2n" if a.A.is_complex() else "n",
        "b_rms_weight": "n",
        "c_rms_weight": "n",
        "dt_rms_weight": "d",
    }
    others = {name: (getattr(a, name), shape) for name, shape in optional.items()}
    check_shapes(a.op, {"xz": (a.xz, "b 2d l"), **_shapes(a), **others}, **sizes)
    rows = sizes["r"] + _mapped(a) * ((a.B is None) + (a.C is None))
    if sizes["rows"] < rows:
        raise ValueError(f"{a.op}: `x_proj_weight` must have {rows} rows here; got {tuple(a.x_proj_weight.shape)}")
    check_options(a.op, "bool", delta_softplus=a.delta_softplus)
    check_options(a.op, "int", checkpoint_lvl=a.checkpoint_lvl)
    check_options(a.op, "number", b_c_dt_rms_eps=a.b_c_dt_rms_eps)
    if a.checkpoint_lvl not in (0, 1):
        raise ValueError(f"{a.op}: `checkpoint_lvl` must be 0 or 1; got {a.checkpoint_lvl}")
    _check_map(a, "B", a.B, a.B_proj_bias, a.b_rms_weight)
    _check_map(a, "C", a.C, a.C_proj_bias, a.c_rms_weight)
    return sizes


def _mapped(a: Any) -> int:
    """Rows of B, or of C, in the projection."""
    return (2 if a.A.is_complex() else 1) * a.A.shape[1]


def _shapes(a: Any) -> dict[str, tuple[Any, str]]:
    """Which shapes B and C may have beside A."""
    shape = "d n | b n 2l | b g n 2l" if a.A.is_complex() else "d n | b n l | b g n l"
    return {"B": (a.B, shape), "C": (a.C, shape)}


def _check_map(a: Any, name: str, given: Tensor | None, bias: Tensor | None, rms_weight: Tensor | None) -> None:
    """Refuses options that B or C cannot have together."""
    if given is not None and bias is not None:
        raise ValueError(
            f"{a.op}: `{name}_proj_bias` belongs to a projected `{name}`; leave it away where that is given"
        )
    if rms_weight is not None and (a.A.is_complex() or (given is not None and given.ndim == 2)):
        what = "complex `A`" if a.A.is_complex() else f"a `{name}` that is fixed"
        raise ValueError(f"{a.op}: there is no `{name.lower()}_rms_weight` with {what}")


def _time_major(t: Tensor, A: Tensor, x: Tensor) -> Tensor:
    """B or C as the package has it → (d n), (b l n) or (b l g n), complex where the time axis has both parts."""
    if t.ndim == 2:
        return beside(t, x)
    t = t.movedim(-1, 1)
    return _complex(t.unflatten(1, (-1, 2)).movedim(2, -1), x) if A.is_complex() else beside(t, x)


def _complex(t: Tensor, x: Tensor) -> Tensor:
    """(..., 2) → (...), complex64, or complex128 beside a float64 ``x``."""
    return torch.complex(*t.to(torch.promote_types(t.dtype, precision(x))).unbind(-1))
