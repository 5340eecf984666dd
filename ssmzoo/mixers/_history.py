"""A long convolution that goes on from what it has seen: the state is the inputs themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels import fft_conv
from ssmkernels.core.packing import longest, pad
from ssmkernels.core.validate import precision


def taps_needed(length: int, history: Tensor | None, cu_seqlens: Tensor | None, most: int | None) -> int:
    """How many taps meet an input of a call, ``most`` at most."""
    count = longest(length, cu_seqlens) + (0 if history is None else history.shape[1])
    return count if most is None else min(count, most)


def convolve_on(
    u: Tensor,
    kernel: Tensor,
    D: Tensor,
    gate: Tensor | None,
    history: Tensor | None,
    cu_seqlens: Tensor | None,
    most: int | None,
) -> tuple[Tensor, Tensor | None]:
    """gate ∘ (kernel ∗ u + D u), with the inputs before u.

    Args:
        u: ``(b l d)``.
        kernel: ``(d n)``, n as of :func:`taps_needed`.
        D: ``(d)``.
        gate: as u; None for 1.
        history: the inputs before, the newest last, ``(s h d)``, float32 (float64), zeros where there were none; None
            to begin, and to get none.
        cu_seqlens: borders of packed sequences.
        most: taps of the whole kernel; None for no end. The history after is at most one shorter.

    Returns:
        ``(b l d)`` and the history after.
    """
    if history is None:
        return fft_conv(u, kernel, D, gate=gate, cu_seqlens=cu_seqlens), None
    if cu_seqlens is None:
        inputs = torch.cat([history.to(u.dtype), u], dim=1)
        y = _newest(inputs, kernel, D, u.shape[1])
        after = inputs if most is None else inputs[:, max(0, inputs.shape[1] - (most - 1)) :]
    else:
        index, mask = pad(cu_seqlens)
        padded = torch.where(mask[..., None], u[0, index], 0)
        inputs = torch.cat([history.to(u.dtype), padded], dim=1)
        y = _newest(inputs, kernel, D, padded.shape[1])[mask][None]
        size = inputs.shape[1] if most is None else min(inputs.shape[1], most - 1)
        row = torch.arange(size, device=u.device) - size + history.shape[1] + cu_seqlens.diff().long()[:, None]
        rows = inputs.gather(1, row.clamp(min=0)[..., None].expand(-1, -1, u.shape[2]))
        after = torch.where((row >= 0)[..., None], rows, 0)
    return y if gate is None else y * gate, after.to(precision(u))


def _newest(inputs: Tensor, kernel: Tensor, D: Tensor, count: int) -> Tensor:
    """The last ``count`` outputs for all inputs (s h d): (s count d)."""
    if count != 1:
        return fft_conv(inputs, kernel, D)[:, inputs.shape[1] - count :]
    wide = inputs[:, max(0, inputs.shape[1] - kernel.shape[1]) :].to(kernel.dtype)
    y = torch.einsum("shd,dh->sd", wide, kernel.flip(1)) + D * wide[:, -1]
    return y[:, None].to(inputs.dtype)
