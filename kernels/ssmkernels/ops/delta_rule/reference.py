"""The gated delta rule as a recurrence, one token after another.

Gated DeltaNet (arXiv 2412.06464), equation 10: the state decays first, then the delta rule corrects it. A decay per key
channel as in Kimi Linear (arXiv 2510.26692), equation 1.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

from ssmkernels.core.recurrence import recurrence
from ssmkernels.core.validate import precision


@recurrence
def compute(S, q, k, v, beta, log_decay, scale):
    """S (b h k v), and at one time q, k (b g k), v (b h v), beta (b h), log_decay (b h | b h k) → o (b h v), S."""
    wide = precision(q)
    v, beta = v.to(wide), beta.to(wide)
    q, k = (repeat(t.to(wide), "b g k -> b (g r) k 1", r=v.shape[1] // t.shape[1]) for t in (q, k))
    if log_decay is not None:
        S = decay_of(log_decay.to(wide)) * S
    error = v - (S * k).sum(-2)  # (b h v): what S holds for the key, against what it should hold
    S = S + k * rearrange(beta[..., None] * error, "b h v -> b h 1 v")
    return scale_of(scale, q.shape[-2]) * (S * q).sum(-2), S


def decay_of(log_decay: Tensor) -> Tensor:
    """(b h) or (b h k) → what a state (b h k v) is multiplied by."""
    alpha = torch.exp(log_decay)
    return alpha[..., None] if alpha.ndim == 3 else alpha[..., None, None]


def scale_of(scale: float | None, k: int) -> float:
    """The scale of the output."""
    return k**-0.5 if scale is None else scale
