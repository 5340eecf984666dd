"""What the norms of :mod:`ssmkernels.compat.mamba_ssm` do."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import rms_norm
from ssmkernels.compat._dtypes import beside
from ssmkernels.core.validate import REAL, check_dtypes, check_options, check_shapes, precision


def gated(a: Any) -> Tensor:
    """norm(x) · silu(z), or norm(x · silu(z)), as ``ops.triton.layernorm_gated`` has it."""
    rms = getattr(a, "is_rms_norm", True)
    arguments = {"x": (a.x, "... d"), "weight": (a.weight, "d"), "bias": (a.bias, "d"), "z": (a.z, "... d")}
    check_shapes(a.op, arguments, ("x", "weight"))
    check_dtypes(a.op, {name: t for name, (t, _) in arguments.items()}, REAL)
    check_options(a.op, "bool", norm_before_gate=a.norm_before_gate, is_rms_norm=rms)
    width = a.x.shape[-1]
    if a.group_size is not None and (a.group_size < 1 or width % a.group_size):
        raise ValueError(f"{a.op}: `group_size` must divide the {width} channels of `x`; got {a.group_size}")
    if rms and a.bias is None:
        gate = None if a.z is None else a.z.to(a.x.dtype)
        options = {"gate": gate, "norm_before_gate": a.norm_before_gate, "group_size": a.group_size}
        found = rms_norm(a.x, beside(a.weight, a.x), eps=a.eps, implementation=a.implementation, **options)
        assert isinstance(found, Tensor)
        return found
    wide = precision(a.x)
    x, gate = a.x.to(wide), None if a.z is None else F.silu(a.z.to(wide))
    if gate is not None and not a.norm_before_gate:
        x = x * gate
    y = normalised(x.unflatten(-1, (-1, a.group_size or width)), a.eps, rms).flatten(-2)
    y = scaled(y, a.weight, a.bias)
    return (y if gate is None or not a.norm_before_gate else y * gate).to(a.x.dtype)


def added(a: Any) -> Any:
    """The norm of a sum, as ``ops.triton.layer_norm`` has it: of x, perhaps a second input, and the residual stream."""
    rms = getattr(a, "is_rms_norm", True)
    check_shapes(
        a.op,
        {
            "x": (a.x, "... d"),
            "weight": (a.weight, "d"),
            "bias": (a.bias, "d"),
            "residual": (a.residual, "... d"),
            "x1": (a.x1, "... d"),
            "weight1": (a.weight1, "d"),
            "bias1": (a.bias1, "d"),
        },
        ("x", "weight"),
    )
    check_options(a.op, "bool", prenorm=a.prenorm, residual_in_fp32=a.residual_in_fp32, is_rms_norm=rms)
    check_options(a.op, "number", eps=a.eps, dropout_p=a.dropout_p)
    if not 0 <= a.dropout_p < 1:
        raise ValueError(f"{a.op}: `dropout_p` must be in [0, 1); got {a.dropout_p}")
    check_dtypes(a.op, {"rowscale": a.rowscale}, REAL)
    if a.rowscale is not None and a.rowscale.shape != a.x.shape[:-1]:
        raise ValueError(
            f"{a.op}: `rowscale` must have shape {tuple(a.x.shape[:-1])}, as `x` without its channels; got "
            f"{tuple(a.rowscale.shape)}"
        )
    if a.rowscale is not None and a.x1 is not None:
        raise ValueError(f"{a.op}: `rowscale` does not go with `x1`; leave one of them out")
    wide = precision(a.x) if a.residual is None else precision(a.x, a.residual)
    total: Tensor | None = None
    masks: list[Tensor | None] = []
    for part in (a.x, a.x1):
        if part is None:
            masks.append(None)
            continue
        part = part.to(wide)
        if a.rowscale is not None:
            part = part * a.rowscale[..., None].to(wide)
        mask = torch.rand_like(part) >= a.dropout_p if a.dropout_p else None
        masks.append(mask)
        if mask is not None:
            part = part * mask / (1 - a.dropout_p)
        total = part if total is None else total + part
    assert total is not None
    if a.residual is not None:
        total = total + a.residual.to(wide)
    normed = normalised(total, a.eps, rms)
    found: list[Tensor | None] = [scaled(normed, a.weight, a.bias).to(a.x.dtype)]
    if a.weight1 is not None:
        found.append(scaled(normed, a.weight1, a.bias1).to(a.x.dtype))
    if a.prenorm:
        kept = a.residual.dtype if a.residual is not None else torch.float32 if a.residual_in_fp32 else a.x.dtype
        found.append(total.to(torch.promote_types(kept, torch.float64) if wide == torch.float64 else kept))
    found += masks if a.return_dropout_mask else []
    return found[0] if len(found) == 1 else tuple(found)


def normalised(x: Tensor, eps: float, rms: bool) -> Tensor:
    """x over its root mean square, or less its mean and over its deviation."""
    return F.rms_norm(x, x.shape[-1:], eps=eps) if rms else F.layer_norm(x, x.shape[-1:], eps=eps)


def scaled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x · weight + bias, in x's dtype."""
    y = x * weight.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)
