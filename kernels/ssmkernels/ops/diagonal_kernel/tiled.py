"""The kernel of a diagonal state-space model as one matrix product per channel: no (d n length) tensor.

With blocks of r taps and t = q r + i, the sum Σ_n (C_n B̄_n Ā_n^{qr}) Ā_n^i is a product of two small tables:
what each block starts from, (blocks n), and the powers within a block, (n r). With r near √length both hold
n √length numbers a channel, forward and backward. The tables come by doubling, from a^0..a^{m-1} to
a^0..a^{2m-1}, in float64: there, unlike in float32, neither a high power nor its gradient loses digits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.ops.diagonal_kernel.modes import Powers, power_table, sum_of_powers


def unsupported(a: Any) -> str | None:
    return "no float64 on this device" if a.A.device.type == "mps" else None


def compute(a: Any) -> Tensor:
    return sum_of_powers(_taps, a)


def _taps(a: Powers) -> Tensor:
    block = 1 << (max(a.length, 1) - 1).bit_length() // 2
    blocks = -(-a.length // block)
    powers, leap = power_table(a.ratio, block)  # (d n block), (d n)
    starts = a.weight[..., None] * power_table(leap, blocks)[0]  # (d n blocks)
    if a.ratio.is_complex():  # 2 Re(xy) = 2 Re x Re y - 2 Im x Im y: one real product over 2n
        starts = torch.cat([2 * starts.real, -2 * starts.imag], dim=1)
        powers = torch.cat([powers.real, powers.imag], dim=1)
    taps = torch.bmm(starts.mT.to(a.dtype), powers.to(a.dtype))  # (d blocks block)
    if taps.requires_grad:  # bmm is very slow on strides of 0, which the gradient of a sum has
        taps.register_hook(lambda g: None if g is None else g.contiguous())
    return taps.flatten(1)[:, : a.length].contiguous()
