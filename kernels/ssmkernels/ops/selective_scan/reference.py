"""The selective scan as the paper writes it: one step after another.

Mamba (arXiv 2312.00752), equations 1 and 2 with the simplified zero-order hold of section 3.2: Ā = exp(ΔA), B̄ = ΔB.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from ssmkernels.core.recurrence import recurrence
from ssmkernels.core.validate import precision


@recurrence
def compute(h, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """h (b d n), and at one time u, delta, z (b d), B, C (b n), (b g n) or, fixed, (1 d n) → y (b d), h (b d n)."""
    wide = precision(u)
    u, delta, A, B, C = (x.to(torch.promote_types(x.dtype, wide)) for x in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(wide)  # (b d)
    if delta_softplus:
        delta = F.softplus(delta, threshold=40)  # from PyTorch's own 20 on, x is not yet softplus(x) in float64
    B, C = (_per_channel(x, u.shape[-1]) for x in (B, C))
    delta = delta[..., None]  # (b d 1)
    h = torch.exp(delta * A) * h + delta * B * u[..., None]  # (b d n)
    y = (h * C).sum(-1)  # (b d)
    if A.is_complex():
        y = 2 * y.real  # each entry stands for itself and its conjugate
    if D is not None:
        y = y + D.to(wide) * u
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y, h


def _per_channel(x: Tensor, d: int) -> Tensor:
    """(b n) or (b g n) → what broadcasts against (b d n)."""
    if x.ndim == 2:
        return x[:, None]
    return repeat(x, "b g n -> b (g c) n", c=d // x.shape[1])
