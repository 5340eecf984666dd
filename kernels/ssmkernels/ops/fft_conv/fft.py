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
from torch import Tensor

from ssmkernels.core.gradient import with_gradient
from ssmkernels.core.memory import large_pages
from ssmkernels.core.packing import pad
from ssmkernels.core.validate import precision
from ssmkernels.ops.fft_conv import reference
from ssmkernels.ops.fft_conv.circle import Circles, lay_out
from ssmkernels.ops.fft_conv.non_finite import cleaned, reached

CACHED = 2**20  # points of all circles that are under way at once, on a CPU
RESIDENT = 2**28  # likewise on a GPU, which wants much work at once


def compute(a: Any) -> Tensor:
    if a.u.numel() == 0:  # no FFT library takes an empty batch
        return reference.compute(a)
    if a.cu_seqlens is None:
        return _convolve(a)
    index, mask = pad(a.cu_seqlens)

    def padded(x: Tensor) -> Tensor:
        return torch.where(mask[..., None], x[0, index], 0)  # (s longest d)

    gate = None if a.gate is None else padded(a.gate)
    return _convolve(a._replace(u=padded(a.u), gate=gate, cu_seqlens=None))[mask][None]


def _convolve(a: Any) -> Tensor:
    wide, l = precision(a.u), a.u.shape[1]
    D, reverse = a.D, a.kernel_reverse
    return _convolution(
        a._replace(
            kernel=reference.trim(a.kernel, l).to(wide),
            D=None if D is None else D.to(wide),
            kernel_reverse=None if reverse is None else reference.trim(reverse, l - 1).to(wide),
        )
    )


def _forward(a: Any) -> Tensor:
    circles = _layout(a)
    y = torch.empty(a.u.shape, dtype=a.u.dtype, device=a.u.device)
    large_pages(y)
    for c in _groups(a.u, circles):
        x = circles.spread(a.u[..., c], a.kernel.dtype)  # (b c blocks n)
        out = _sums(circles, x, torch.fft.rfft(x), _taps(circles, a.kernel, a.kernel_reverse, c), a.D, c)
        if not _finite(circles, out):
            out = _sums_apart(circles, a, c)
        y[..., c] = out.mT if a.gate is None else out.mT * a.gate[..., c]
    return y


def _backward(a: Any, dy: Tensor, wanted: set[str]) -> dict[str, Tensor]:
    u, kernel, D, reverse, gate = a.u, a.kernel, a.D, a.kernel_reverse, a.gate
    circles = _layout(a)
    like = torch.contiguous_format
    found = {name: torch.empty_like(getattr(a, name), memory_format=like) for name in wanted}
    du, dkernel, dD, dreverse, dgate = (found.get(name) for name in ("u", "kernel", "D", "kernel_reverse", "gate"))
    large_pages(du, dgate)
    wants_taps = dkernel is not None or dreverse is not None
    for c in _groups(u, circles):
        inner = dy[..., c] if gate is None else dy[..., c].to(kernel.dtype) * gate[..., c]
        g = circles.underlap(inner, kernel.dtype)  # (b c blocks n)
        # What nobody wants is None.
        x: Any = None if wanted == {"u"} else circles.spread(u[..., c], kernel.dtype)
        spectrum: Any = torch.fft.rfft(g) if du is not None or wants_taps else None
        inputs: Any = torch.fft.rfft(x) if wants_taps or dgate is not None else None
        taps: Any = _taps(circles, kernel, reverse, c) if du is not None or dgate is not None else None
        if wants_taps:
            products = (spectrum * inputs.conj()).sum((0, 2))  # (c n/2+1)
            dtaps, dbefore = circles.unwind(torch.fft.irfft(products, circles.size))
            if dkernel is not None:
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
    return found


_convolution = with_gradient(_forward, _backward, reference.compute)


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


def _sums_apart(circles: Circles, a: Any, c: slice) -> Tensor:
    """:func:`_sums` of inputs that hold NaN or infinity: NaN where the direct sum meets one of them, and only there.

    An FFT mixes all points, so that one NaN would also reach outputs that do not depend on it, such as earlier ones.
    Packed sequences are padded: a tap of ``kernel_reverse`` that is NaN meets the zeros behind them too.
    """

    u, kernel, reverse = a.u[..., c], a.kernel, a.kernel_reverse
    x = circles.spread(cleaned(u), kernel.dtype)
    taps = _taps(circles, cleaned(kernel), None if reverse is None else cleaned(reverse), c)
    out = _sums(circles, x, torch.fft.rfft(x), taps, a.D, c)
    hit = reached(u, kernel[c], None if reverse is None else reverse[c])
    return out.masked_fill(hit, torch.nan)


def _layout(a: Any) -> Circles:
    return lay_out(a.u.shape[1], a.kernel.shape[1], 0 if a.kernel_reverse is None else a.kernel_reverse.shape[1])


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
