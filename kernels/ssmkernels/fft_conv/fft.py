"""The long convolution by real FFTs: O(l log l) instead of O(l l_k)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.fft_conv import reference
from ssmkernels.packing import pad
from ssmkernels.validate import precision


def fft_conv(
    u: Tensor, kernel: Tensor, D: Tensor | None, kernel_reverse: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    if u.numel() == 0:  # no FFT library takes an empty batch
        return reference.fft_conv(u, kernel, D, kernel_reverse, cu_seqlens)
    wide = precision(u)
    x = u.to(wide)
    if cu_seqlens is None:
        y = _convolve(x, kernel.to(wide), kernel_reverse)
    else:
        index, mask = pad(cu_seqlens)
        padded = torch.where(mask[..., None], x[0, index], 0)  # (s longest d)
        y = _convolve(padded, kernel.to(wide), kernel_reverse)[mask][None]
    if D is not None:
        y = y + D.to(wide) * x
    return y.to(u.dtype).contiguous()


def _convolve(x: Tensor, kernel: Tensor, kernel_reverse: Tensor | None) -> Tensor:
    """x (b l d), kernel (d l_k), kernel_reverse (d l_r) → y (b l d), one circle of n points that nothing goes
    around.

    The lags reach from -l_r to l_k-1. Outputs past the end, up to l + l_k - 2, must not wrap onto position 0,
    nor those before the start, from -l_r, onto position l-1: n ≥ l + max(l_k - 1, l_r).
    """
    l = x.shape[1]
    kernel = reference.trim(kernel, l)
    l_k, l_r = kernel.shape[1], 0
    if kernel_reverse is not None:
        kernel_reverse = reference.trim(kernel_reverse, l - 1).to(kernel.dtype)
        l_r = kernel_reverse.shape[1]
    n = fft_size(l + max(l_k - 1, l_r))
    if kernel_reverse is not None:  # lag -1 sits at the circle's end, lag -l_r at n - l_r
        between = kernel.new_zeros(kernel.shape[0], n - l_k - l_r)
        kernel = torch.cat([kernel, between, kernel_reverse.flip(1)], dim=1)
    product = torch.fft.rfft(x.mT, n) * torch.fft.rfft(kernel, n)  # (b d n/2+1)
    return torch.fft.irfft(product, n)[..., :l].mT


def fft_size(least: int) -> int:
    """The smallest even size with no prime factor above 5, at least ``least``: fast in every FFT library."""
    half = -(-least // 2)
    best = 1 << max(half - 1, 0).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            two = 1 << max(-(-half // three) - 1, 0).bit_length()
            best = min(best, three * two)
            three *= 3
        five *= 5
    return 2 * best
