"""Sequences that fit no circle of the Triton kernels, by overlap-add: in segments, with the kernel in parts.

A part has as many taps as a segment has tokens, so that what it makes of a segment lies within two segments and fits
the largest circle. Both kernels are taken as one over all lags, those into the future below 0. All sums are in float32.
The number of pairs of a segment and a part grows with the square of the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.ops.fft_conv import triton_launch
from ssmkernels.ops.fft_conv.triton_launch import Circle


class Parts(NamedTuple):
    """Taps of all lags, ``(d, parts, size)``; ``before`` parts hold the lags below 0."""

    taps: Tensor
    before: int


class Pair(NamedTuple):
    """A part and the segments that it meets: segment i goes to the ones at i + ``shift`` and after it.

    Segments of a result are counted from the one before the sequence's first.
    """

    part: int
    sources: slice
    shift: int

    def targets(self, after: int) -> slice:
        return slice(self.sources.start + self.shift + after, self.sources.stop + self.shift + after)


def convolve(a: Any, x: Tensor, gate: Tensor | None, adjoint: bool) -> Tensor:
    """As ``triton_launch.convolve``, for one sequence or a batch: x and gate (b d l) → (b d l) in float32."""
    x = x.float()
    if adjoint and gate is not None:
        x = x * gate
    length = x.shape[2]
    parts = _parts(a, length, adjoint)
    sources = _segments(x, parts)
    b, n, d, size = sources.shape
    y = sources.new_zeros(b, n + 2, d, size)
    for pair in _pairs(parts, n):
        circle, call, alone = _on_circle(a, parts, pair, sources)
        found = triton_launch.convolve([circle], call, alone, None, adjoint=False).mT.unflatten(0, (b, -1))
        for after, half in enumerate(found.split(size, dim=3)):
            y[:, pair.targets(after)] += half
    y = y[:, 1:-1].transpose(1, 2).flatten(2)[..., :length]
    if a.D is not None:
        y = y + a.D.float()[:, None] * x
    return y * gate if gate is not None and not adjoint else y


def correlate(a: Any, x: Tensor, g: Tensor, gate: Tensor | None) -> dict[str, Tensor]:
    """As ``triton_launch.correlate``, for one sequence or a batch."""
    x, g = x.float(), g.float()
    if gate is not None:
        g = g * gate
    length = x.shape[2]
    parts = _parts(a, length, adjoint=False)
    sources, targets = _segments(x, parts), F.pad(_segments(g, parts), (0, 0, 0, 0, 1, 1))
    sums = torch.zeros_like(parts.taps)
    for pair in _pairs(parts, sources.shape[1]):
        circle, call, alone = _on_circle(a, parts, pair, sources)
        both = torch.cat([targets[:, pair.targets(after)] for after in range(2)], dim=3).flatten(0, 1)
        sums[:, pair.part] = triton_launch.correlate([circle], call, alone, both, None)["kernel"]
    lags, zero = sums.flatten(1), parts.before * sums.shape[2]

    def gradient(of: Tensor, found: Tensor) -> Tensor:
        return F.pad(found, (0, of.shape[1] - found.shape[1]))  # further taps meet nothing

    found = {"kernel": gradient(a.kernel, lags[:, zero : zero + min(a.kernel.shape[1], length)])}
    if a.kernel_reverse is not None:
        ahead = min(a.kernel_reverse.shape[1], length - 1)
        found["kernel_reverse"] = gradient(a.kernel_reverse, lags[:, zero - ahead : zero].flip(1))
    if a.D is not None:
        found["D"] = (x * g).sum((0, 2))
    return found


def _parts(a: Any, length: int, adjoint: bool) -> Parts:
    """The taps of a call that a sequence can meet; those of the adjoint are the same at the opposite lags."""
    after = a.kernel[:, :length].float()
    ahead = after[:, :0] if a.kernel_reverse is None else a.kernel_reverse[:, : length - 1].float()
    if adjoint:
        after = F.pad(after, (0, max(0, 1 - after.shape[1])))  # a lag 0, even of a kernel without taps
        after, ahead = torch.cat([after[:, :1], ahead], dim=1), after[:, 1:]
    size = triton_launch.LARGEST
    before = -(-ahead.shape[1] // size)
    ahead = F.pad(ahead, (0, before * size - ahead.shape[1])).flip(1)
    taps = torch.cat([ahead, F.pad(after, (0, -after.shape[1] % size))], dim=1)
    return Parts(taps.unflatten(1, (-1, size)), before)


def _segments(x: Tensor, parts: Parts) -> Tensor:
    """(b d l) → (b segments d size), zeros after the end."""
    size = parts.taps.shape[2]
    return F.pad(x, (0, -x.shape[2] % size)).unflatten(2, (-1, size)).transpose(1, 2)


def _pairs(parts: Parts, segments: int) -> Iterator[Pair]:
    for part in range(parts.taps.shape[1]):
        lag = part - parts.before  # of its first tap, in segments
        sources = slice(max(0, -lag - 1), min(segments, segments - lag))
        if sources.start < sources.stop:
            yield Pair(part, sources, lag + 1)


def _on_circle(a: Any, parts: Parts, pair: Pair, sources: Tensor) -> tuple[Circle, Any, Tensor]:
    """What a part and its segments are to the launches: a circle, a call, and the segments with zeros after each."""
    size = parts.taps.shape[2]
    alone = F.pad(sources[:, pair.sources], (0, size)).flatten(0, 1)
    taps = parts.taps[:, pair.part].contiguous()
    call = a._replace(kernel=taps, kernel_reverse=None, D=None, gate=None, cu_seqlens=None)
    return Circle(size, 2 * size, len(alone), None), call, alone
