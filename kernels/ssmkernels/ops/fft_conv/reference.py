"""The long convolution as a plain sum over lags."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.packing import spans
from ssmkernels.core.validate import precision


def fft_conv(
    u: Tensor,
    kernel: Tensor,
    D: Tensor | None,
    kernel_reverse: Tensor | None,
    gate: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    if cu_seqlens is None:
        return _one_batch(u, kernel, D, kernel_reverse, gate)
    ys = [
        _one_batch(u[:, time], kernel, D, kernel_reverse, None if gate is None else gate[:, time])
        for _, time in spans(cu_seqlens)
    ]
    return torch.cat([u[:, :0], *ys], dim=1)


def _one_batch(
    u: Tensor, kernel: Tensor, D: Tensor | None, kernel_reverse: Tensor | None, gate: Tensor | None
) -> Tensor:
    wide = precision(u)
    l = u.shape[1]
    x = u.to(wide)
    y = torch.zeros_like(x) if D is None else D.to(wide) * x  # (b l d)
    for j, tap in enumerate(trim(kernel, l).to(wide).T):  # lag j: the input j steps ago
        y = y + F.pad(tap * x[:, : max(l - j, 0)], (0, 0, min(j, l), 0))
    if kernel_reverse is not None:
        for j, tap in enumerate(trim(kernel_reverse, l - 1).to(wide).T, start=1):  # the input j steps ahead
            y = y + F.pad(tap * x[:, j:], (0, 0, 0, min(j, l)))
    if gate is not None:
        y = gate.to(wide) * y
    return y.to(u.dtype).contiguous()


def trim(kernel: Tensor, length: int) -> Tensor:
    """The taps that meet an input, (d l_k) → at most (d length); one at least, so that gradients exist."""
    return kernel[:, : max(length, 1)]
