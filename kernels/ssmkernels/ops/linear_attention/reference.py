"""Linear attention as a recurrence, one token after another (arXiv 2312.06635, equation 3; 2404.05892, section 4.2)."""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor

from ssmkernels.core.recurrence import recurrence
from ssmkernels.core.validate import precision


@recurrence
def compute(S, q, k, v, log_decay, bonus, scale):
    """S (b h k v), at one time q, k (b g k), v (b h v), log_decay (h), (b h) or (b h k) → o (b h v), S (b h k v)."""
    wide = precision(q)
    q, k = (repeat(t.to(wide), "b g k -> b (g r) k", r=v.shape[1] // t.shape[1]) for t in (q, k))
    fed = k[..., None] * v.to(wide)[..., None, :]  # (b h k v)
    after = fed + (S if log_decay is None else decay(log_decay.to(wide)) * S)
    seen = after if bonus is None else S + bonus.to(wide)[..., None] * fed
    return scale_of(scale, k) * (q[..., None] * seen).sum(-2), after


def decay(log_decay: Tensor) -> Tensor:
    """w ((b) h 1 1) or (b h k 1)."""
    w = torch.exp(log_decay)
    return w[..., None] if w.ndim == 3 else w[..., None, None]


def scale_of(scale: float | None, k: Tensor) -> float:
    """The scale of the output: that of the call, or 1/√k."""
    return k.shape[-1] ** -0.5 if scale is None else scale
