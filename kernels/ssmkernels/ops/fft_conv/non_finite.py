"""Where NaN and infinity reach in a long convolution: an FFT mixes all points, and would take them further."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cleaned(x: Tensor) -> Tensor:
    """x with zeros in place of NaN and infinity."""
    return torch.where(x.isfinite(), x, 0)


def reached(u: Tensor, kernel: Tensor, reverse: Tensor | None) -> Tensor:
    """The outputs whose direct sum meets NaN or infinity: (b l d), (d l_k) and (d l_r) → (b d l)."""
    l, after = u.shape[1], kernel.shape[1]
    before = 0 if reverse is None else reverse.shape[1]
    so_far = F.pad((~u.isfinite()).mT.cumsum(2), (1, 0))  # (b d l+1), how many came before each position
    time = torch.arange(l, device=u.device)
    last = (time + 1 + before).clamp(max=l)
    hit = so_far[..., last] > so_far[..., (time + 1 - after).clamp(min=0)]
    if after:
        hit |= (kernel.isfinite().logical_not().cumsum(1) > 0)[:, time.clamp(max=after - 1)]
    if reverse is not None and before:
        beyond = (reverse.isfinite().logical_not().cumsum(1) > 0)[:, (l - 2 - time).clamp(0, before - 1)]
        hit |= beyond & (time < l - 1)
    return hit
