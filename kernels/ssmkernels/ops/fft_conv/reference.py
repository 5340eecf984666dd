"""The long convolution as a plain sum over lags."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.packing import spans
from ssmkernels.core.validate import precision


def compute(a: Any) -> Tensor:
    if a.cu_seqlens is None:
        return _one_batch(a)
    ys = [
        _one_batch(a._replace(u=a.u[:, time], gate=None if a.gate is None else a.gate[:, time]))
        for _, time in spans(a.cu_seqlens)
    ]
    return torch.cat([a.u[:, :0], *ys], dim=1)


def _one_batch(a: Any) -> Tensor:
    wide = precision(a.u)
    l = a.u.shape[1]
    x = a.u.to(wide)
    y = torch.zeros_like(x) if a.D is None else a.D.to(wide) * x  # (b l d)
    for j, tap in enumerate(trim(a.kernel, l).to(wide).T):  # lag j: the input j steps ago
        y = y + F.pad(tap * x[:, : max(l - j, 0)], (0, 0, min(j, l), 0))
    if a.kernel_reverse is not None:
        for j, tap in enumerate(trim(a.kernel_reverse, l - 1).to(wide).T, start=1):  # the input j steps ahead
            y = y + F.pad(tap * x[:, j:], (0, 0, 0, min(j, l)))
    if a.gate is not None:
        y = a.gate.to(wide) * y
    return y.to(a.u.dtype).contiguous()


def trim(kernel: Tensor, length: int) -> Tensor:
    """The taps that meet an input, (d l_k) → at most (d length); one at least, so that gradients exist."""
    return kernel[:, : max(length, 1)]
