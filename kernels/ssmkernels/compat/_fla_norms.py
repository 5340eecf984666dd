"""What the norms of :mod:`ssmkernels.compat.fla.modules` do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import rms_norm
from ssmkernels.compat._dtypes import beside
from ssmkernels.compat._norms import normalised, scaled
from ssmkernels.core.validate import REAL, check_dtypes, check_options, check_shapes, precision

GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "swish": F.silu, "sigmoid": torch.sigmoid}


def normed(a: Any) -> Any:
    """norm(x + residual) · weight + bias, perhaps times a gate, and perhaps the sum."""
    g = getattr(a, "g", None)
    arguments = {
        "x": (a.x, "... d"),
        "weight": (a.weight, "d"),
        "bias": (a.bias, "d"),
        "residual": (a.residual, "... d"),
    }
    arguments |= {"g": (g, "... d")} if hasattr(a, "g") else {}
    check_shapes(a.op, arguments, ("x", "g") if hasattr(a, "g") else ("x",))
    check_dtypes(a.op, {name: t for name, (t, _) in arguments.items()}, REAL)
    check_options(a.op, "bool", prenorm=a.prenorm, residual_in_fp32=a.residual_in_fp32)
    check_options(a.op, "number", eps=a.eps)
    gate = getattr(a, "activation", "silu")
    if gate not in GATES:
        raise ValueError(f"{a.op}: `activation` must be one of {', '.join(GATES)}; got {gate!r}")
    if a.is_rms_norm and a.bias is None and a.weight is not None and a.residual is None and gate != "sigmoid":
        options = {"gate": None if g is None else g.to(a.x.dtype), "implementation": a.implementation}
        y: Any = rms_norm(a.x, beside(a.weight, a.x), eps=a.eps, **options)
        total = a.x
    else:
        wide = precision(a.x) if a.residual is None else precision(a.x, a.residual)
        total = a.x.to(wide) if a.residual is None else a.x.to(wide) + a.residual.to(wide)
        y = normalised(total, a.eps, a.is_rms_norm)
        y = y if a.weight is None else scaled(y, a.weight, a.bias)
        y = (y if g is None else y * GATES[gate](g.to(wide))).to(a.x.dtype)
    if not a.prenorm:
        return y
    kept = a.residual.dtype if a.residual is not None else a.x.dtype
    return y, total.to(torch.promote_types(kept, torch.float32) if a.residual_in_fp32 else kept)


def of_length_one(a: Any) -> Tensor:
    """x / √(Σ x² + eps), over the last axis."""
    check_shapes(a.op, {"x": (a.x, "... d")}, ("x",))
    check_dtypes(a.op, {"x": a.x}, REAL)
    wide = a.x.to(precision(a.x))
    y = wide * torch.rsqrt((wide * wide).sum(-1, keepdim=True) + a.eps)
    return y.to(a.x.dtype if a.output_dtype is None else a.output_dtype)
