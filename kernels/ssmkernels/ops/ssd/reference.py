"""The state-space dual as a recurrence, one token after another.

Mamba-2 (arXiv 2405.21060), equation 1 with A a number for each head (section 3.2), discretized as Mamba's scan is: Ā =
exp(ΔA), B̄ = ΔB.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ssmkernels.core.recurrence import recurrence
from ssmkernels.core.validate import precision


@recurrence
def compute(h, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit):
    """h (b h p n), and at one time x, z (b h p), dt (b h), B, C (b g n) → y (b h p), h (b h p n)."""
    wide = precision(x)
    x, A, B, C = (t.to(wide) for t in (x, A, B, C))
    delta = step_size(dt, dt_bias, dt_softplus, dt_limit)  # (b h)
    B, C = (repeat(t, "b g n -> b (g r) 1 n", r=x.shape[1] // t.shape[1]) for t in (B, C))
    decay = torch.exp(delta * A)
    h = decay[..., None, None] * h + (delta[..., None] * x)[..., None] * B  # (b h p n)
    y = (h * C).sum(-1)  # (b h p)
    return finished(y, x, D, z), h


def step_size(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float]) -> Tensor:
    """Δ (..., h), in the precision of sums."""
    wide = precision(dt)
    delta = dt.to(wide)
    if dt_bias is not None:
        delta = delta + dt_bias.to(wide)
    if dt_softplus:
        delta = F.softplus(delta, threshold=40)  # from PyTorch's own 20 on, x is not yet softplus(x) in float64
    return delta.clamp(*dt_limit)


def finished(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """y (..., h p) with the skip and the gate, in its own precision."""
    if D is not None:
        D = D.to(y.dtype)
        y = y + (D if D.ndim == 2 else rearrange(D, "h -> h 1")) * x
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y
