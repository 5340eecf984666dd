"""The general delta rule as a recurrence, one token after another.

RWKV-7 (arXiv 2503.14456), equations 15 to 17, with the state as (k v), the transpose of the paper's.
"""

from __future__ import annotations

import torch
from einops import einsum
from torch import Tensor

from ssmkernels.core.recurrence import recurrence
from ssmkernels.core.validate import precision


@recurrence
def compute(S, q, k, v, a, b, log_decay, scale):
    """S (b h k v), and at one time q, k, a, b, log_decay (b h k), v (b h v) → o (b h v), S (b h k v)."""
    wide = precision(q)
    q, k, v, a, b = (t.to(wide) for t in (q, k, v, a, b))
    read = einsum(a, S, "b h k, b h k v -> b h v")
    if log_decay is not None:
        S = torch.exp(log_decay.to(wide))[..., None] * S
    S = S + b[..., None] * read[..., None, :] + k[..., None] * v[..., None, :]
    return scale_of(q, scale) * einsum(q, S, "b h k, b h k v -> b h v"), S


def scale_of(q: Tensor, scale: float | None) -> float:
    """The option ``scale`` for queries (..., k)."""
    return q.shape[-1] ** -0.5 if scale is None else scale
