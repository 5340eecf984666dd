"""Attention over parts of the keys, joined (Dao et al. 2023, Flash-Decoding)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmkernels.core.validate import check_dtypes, check_same_dtype, check_shapes, precision


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over each part of them.

    With parts t = 1 … n of the keys, each seen by the same queries::

        lse = log Σ_t exp(lse_t),   out = Σ_t exp(lse_t - lse) out_t

    Args:
        outs: n times ``(b, l, h, v)``, as ``attention(..., return_lse=True)`` gives them; n at least 1.
        lses: n times ``(b, h, l)``, float32 (float64 for float64 ``outs``). Where sinks are used, one part has them.

    Returns:
        (out, lse) of the same shapes and dtypes. A part that shows a query nothing, its lse -∞, adds nothing; where
        all do, the query gives 0 and -∞. Every argument has a gradient.

    Raises:
        TypeError, ValueError: not as many of both, or one of another shape, dtype or device, by name.
    """
    op = "merge_attention"
    if len(outs) != len(lses) or len(outs) < 1:
        raise ValueError(f"{op}: `outs` and `lses` must be as many, at least 1; got {len(outs)} and {len(lses)}")
    shapes = {f"outs[{t}]": (out, "b l h v") for t, out in enumerate(outs)}
    shapes |= {f"lses[{t}]": (lse, "b h l") for t, lse in enumerate(lses)}
    check_shapes(op, shapes, shapes)
    check_same_dtype(op, {f"outs[{t}]": out for t, out in enumerate(outs)})
    wide = precision(outs[0])
    check_dtypes(op, {f"lses[{t}]": lse for t, lse in enumerate(lses)}, [wide])

    parts = torch.stack(tuple(lses))  # (n b h l)
    blind = (parts == -torch.inf).all(0)  # -∞ less -∞ would be NaN, in the gradient too
    lse = parts.masked_fill(blind, 0).logsumexp(0)
    weights = torch.exp(parts - lse).transpose(2, 3)[..., None]  # (n b l h 1)
    out = sum(weight * out.to(wide) for weight, out in zip(weights, outs, strict=True))
    return out.to(outs[0].dtype), lse.masked_fill(blind, -torch.inf)
