"""xLSTM's matrix memory as a recurrence, one token after another: arXiv 2405.04517, equations 19 to 27, stabilised as
in its appendix A.3."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from ssmkernels.core.recurrence import recurrence
from ssmkernels.core.validate import precision

EPSILON = 1e-6


@recurrence
def compute(state, q, k, v, i, f, scale):
    """C (b h k v), n (b h k), m (b h), and at one time q, k (b h k), v (b h v), i, f (b h) → y (b h v) and C, n, m."""
    C, n, m = state
    wide = precision(q)
    q, k, v, i, f = (t.to(wide) for t in (q, k, v, i, f))
    kept, m = log_sigmoid(f) + m, torch.maximum(log_sigmoid(f) + m, i)
    decay, weight = torch.exp(kept - m)[..., None], torch.exp(i - m)[..., None]  # (b h 1)
    C = decay[..., None] * C + weight[..., None] * einsum(k, v, "b h k, b h v -> b h k v")
    n = decay * n + weight * k
    q = q * scale_of(scale, q)
    y = einsum(C, q, "b h k v, b h k -> b h v")
    return y / denominator((n * q).sum(-1), m)[..., None], (C, n, m)


def denominator(sums: Tensor, m: Tensor) -> Tensor:
    """max(|nᵀq|, exp(-m)) + ε, from scaled sums nᵀq and stabilisers. exp(-m) stays finite: y is 0 there either way."""
    most = math.log(torch.finfo(m.dtype).max) - 1
    return torch.maximum(sums.abs(), torch.exp((-m).clamp(max=most))) + EPSILON


def log_sigmoid(f: Tensor) -> Tensor:
    return -F.softplus(-f, threshold=40)  # from PyTorch's own 20 on, x is not yet softplus(x) in float64


def scale_of(scale: float | None, q: Tensor) -> float:
    """The factor of queries (… k): the given one, or 1/√k."""
    return 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale
