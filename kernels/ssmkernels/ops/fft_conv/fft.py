"""The long convolution by real FFTs: O(l log l) instead of O(l l_k).

A few channels at a time, so that what lies between stays small: on a CPU in its cache, and in memory that the allocator
has at hand, where fresh pages would cost more than the transforms. The backward pass transforms its inputs once more
instead of keeping their spectra, which take four times the memory of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.double_backward import twice_differentiable
from ssmkernels.core.memory import large_pages
from ssmkernels.core.packing import pad
from ssmkernels.core.validate import precision
from ssmkernels.ops.fft_conv import reference
from ssmkernels.ops.fft_conv.circle import Circles, lay_out

CACHED = 2**20  # points of all circles that are under way at once, on a CPU
RESIDENT = 2**28  # likewise on a GPU, which wants much work at once


def fft_conv(
    u: Tensor,
    kernel: Tensor,
    D: Tensor | None,
    kernel_reverse: Tensor | None,
    gate: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    if u.numel() == 0:  # no FFT library takes an empty batch
        return reference.fft_conv(u, kernel, D, kernel_reverse, gate, cu_seqlens)
    if cu_seqlens is None:
        return _convolve(u, kernel, D, kernel_reverse, gate)
    index, mask = pad(cu_seqlens)

    def padded(x: Tensor) -> Tensor:
        return torch.where(mask[..., None], x[0, index], 0)  # (s longest d)

    y = _convolve(padded(u), kernel, D, kernel_reverse, None if gate is None else padded(gate))
    return y[mask][None]


def _convolve(
    u: Tensor, kernel: Tensor, D: Tensor | None, kernel_reverse: Tensor | None, gate: Tensor | None
) -> Tensor:
    wide, l = precision(u), u.shape[1]
    kernel = reference.trim(kernel, l).to(wide)
    D = None if D is None else D.to(wide)
    if kernel_reverse is not None:
        kernel_reverse = reference.trim(kernel_reverse, l - 1).to(wide)
    return _Convolution.apply(u, kernel, D, kernel_reverse, gate)


def _unpacked(
    u: Tensor, kernel: Tensor, D: Tensor | None, kernel_reverse: Tensor | None, gate: Tensor | None
) -> Tensor:
    return reference.fft_conv(u, kernel, D, kernel_reverse, gate, None)


class _Convolution(torch.autograd.Function):
    """u (b l d), kernel (d l_k), D (d), kernel_reverse (d l_r), gate (b l d) → y (b l d)."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, kernel: Tensor, D: Tensor | None, reverse: Tensor | None, gate: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(u, kernel, D, reverse, gate)
        circles = _layout(u, kernel, reverse)
        y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        large_pages(y)
        for c in _groups(u, circles):
            x = circles.spread(u[..., c], kernel.dtype)  # (b c blocks n)
            out = _sums(circles, x, torch.fft.rfft(x), _taps(circles, kernel, reverse, c), D, c)
            if not _finite(circles, out):
                out = _sums_apart(circles, u[..., c], kernel, reverse, D, c)
            y[..., c] = out.mT if gate is None else out.mT * gate[..., c]
        return y

    @staticmethod
    @twice_differentiable(lambda ctx: (_unpacked, ctx.saved_tensors))
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, kernel, D, reverse, gate = ctx.saved_tensors
        circles = _layout(u, kernel, reverse)
        wants_u, wants_gate = ctx.needs_input_grad[0], gate is not None and ctx.needs_input_grad[4]
        wants_taps = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        du, dgate = (
            torch.empty(u.shape, dtype=u.dtype, device=u.device) if wanted else None for wanted in (wants_u, wants_gate)
        )
        large_pages(du, dgate)
        dD = torch.empty_like(D) if D is not None and ctx.needs_input_grad[2] else None
        dkernel = torch.empty_like(kernel) if wants_taps else None
        dreverse = torch.empty_like(reverse) if wants_taps and reverse is not None else None
        for c in _groups(u, circles):
            inner = dy[..., c] if gate is None else dy[..., c].to(kernel.dtype) * gate[..., c]
            g = circles.underlap(inner, kernel.dtype)  # (b c blocks n)
            # What nobody wants is None.
            x: Any = circles.spread(u[..., c], kernel.dtype) if wants_taps or wants_gate or dD is not None else None
            spectrum: Any = torch.fft.rfft(g) if wants_u or wants_taps else None
            inputs: Any = torch.fft.rfft(x) if wants_taps or wants_gate else None
            taps: Any = _taps(circles, kernel, reverse, c) if wants_u or wants_gate else None
            if dkernel is not None:
                products = (spectrum * inputs.conj()).sum((0, 2))  # (c n/2+1)
                dtaps, dbefore = circles.unwind(torch.fft.irfft(products, circles.size))
                dkernel[c] = dtaps[:, : kernel.shape[1]]
                if dreverse is not None:
                    dreverse[c] = dbefore
            if dD is not None:
                dD[c] = (circles.collect(g) * circles.collect(x)).sum((0, 2))
            if dgate is not None:
                dgate[..., c] = _sums(circles, x, inputs, taps, D, c).mT * dy[..., c]
            if du is not None:
                spectrum *= taps.conj()
                dx = circles.collect(torch.fft.irfft(spectrum, circles.size))  # (b c l)
                if D is not None:
                    dx = torch.addcmul(dx, D[c, None], circles.collect(g))
                du[..., c] = dx.mT
        return du, dkernel, dD, dreverse, dgate


def _sums(circles: Circles, x: Tensor, spectrum: Tensor, taps: Tensor, D: Tensor | None, c: slice) -> Tensor:
    """x (b c blocks n) and its spectrum, which is overwritten → the convolution with the skip, (b c l)."""
    spectrum *= taps
    out = circles.overlap(torch.fft.irfft(spectrum, circles.size))
    return out if D is None else torch.addcmul(out, D[c, None], circles.collect(x))


def _finite(circles: Circles, out: Tensor) -> bool:
    """Whether no NaN or infinity has spread over a whole circle, which shows in the first output of each block.

    Only looked at on the CPU: a GPU would have to be waited for.
    """
    return out.device.type != "cpu" or math.isfinite(out[..., :: circles.block].sum().item())


def _sums_apart(
    circles: Circles, u: Tensor, kernel: Tensor, reverse: Tensor | None, D: Tensor | None, c: slice
) -> Tensor:
    """:func:`_sums` of inputs that hold NaN or infinity: NaN where the direct sum meets one of them, and only there.

    An FFT mixes all points, so that one NaN would also reach outputs that do not depend on it, such as earlier ones.
    Packed sequences are padded: a tap of ``kernel_reverse`` that is NaN meets the zeros behind them too.
    """

    def cleaned(x: Tensor) -> Tensor:
        return torch.where(x.isfinite(), x, 0)

    x = circles.spread(cleaned(u), kernel.dtype)
    taps = _taps(circles, cleaned(kernel), None if reverse is None else cleaned(reverse), c)
    out = _sums(circles, x, torch.fft.rfft(x), taps, D, c)
    l, after = u.shape[1], kernel.shape[1]
    before = 0 if reverse is None else reverse.shape[1]
    so_far = F.pad((~u.isfinite()).mT.cumsum(2), (1, 0))  # (b c l+1), how many came before each position
    time = torch.arange(l, device=u.device)
    last = (time + 1 + before).clamp(max=l)
    hit = so_far[..., last] > so_far[..., (time + 1 - after).clamp(min=0)]
    if after:
        hit |= (kernel[c].isfinite().logical_not().cumsum(1) > 0)[:, time.clamp(max=after - 1)]
    if reverse is not None and before:
        beyond = (reverse[c].isfinite().logical_not().cumsum(1) > 0)[:, (l - 2 - time).clamp(0, before - 1)]
        hit |= beyond & (time < l - 1)
    return out.masked_fill(hit, torch.nan)


def _layout(u: Tensor, kernel: Tensor, reverse: Tensor | None) -> Circles:
    return lay_out(u.shape[1], kernel.shape[1], 0 if reverse is None else reverse.shape[1])


def _groups(u: Tensor, circles: Circles) -> Iterator[slice]:
    """The channels, a few at a time."""
    budget = CACHED if u.device.type == "cpu" else RESIDENT
    step = max(1, budget // (len(u) * circles.blocks * circles.size))
    if u.device.type == "cpu" and step > 4:
        step = step // 4 * 4
    for first in range(0, u.shape[-1], step):
        yield slice(first, first + step)


def _taps(circles: Circles, kernel: Tensor, reverse: Tensor | None, c: slice) -> Tensor:
    """The spectrum of the taps: (c 1 n/2+1)."""
    taps = circles.wind(kernel[c], None if reverse is None else reverse[c])
    return torch.fft.rfft(taps, circles.size)[:, None]
