"""How a long convolution is laid out on circles, on which an FFT convolves.

A sequence of l tokens is cut into blocks of s; each block, padded with zeros to n, is one circle. A block's outputs
reach l_k - 1 tokens beyond its end and l_r before its start, where they are added to its neighbours' (overlap-add).
One block of all l tokens is the usual case; short kernels on long sequences take many.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Circles:
    """The layout for sequences of ``length``, ``after`` = l_k - 1 lags behind the present and ``before`` = l_r ahead.

    Each method is linear, and has its adjoint beside it.
    """

    length: int
    after: int
    before: int
    block: int  # s
    size: int  # n

    @property
    def blocks(self) -> int:
        return -(-self.length // self.block)

    def spread(self, u: Tensor, dtype: torch.dtype) -> Tensor:
        """u (b l c) → (b c blocks n) in another dtype."""
        b, l, c = u.shape
        circles = torch.zeros(b, c, self.blocks, self.size, dtype=dtype, device=u.device)
        whole = l // self.block
        circles[:, :, :whole, : self.block] = u[:, : whole * self.block].unflatten(1, (whole, self.block)).movedim(3, 1)
        circles[:, :, whole:, : l - whole * self.block] = u[:, None, whole * self.block :].movedim(3, 1)[
            :, :, : self.blocks - whole
        ]
        return circles

    def collect(self, circles: Tensor) -> Tensor:
        """The adjoint of :meth:`spread`: (b c blocks n) → (b c l)."""
        return circles[..., : self.block].flatten(2)[..., : self.length]

    def overlap(self, circles: Tensor) -> Tensor:
        """Each circle's outputs at their places: (b c blocks n) → (b c l). May write into ``circles``."""
        body = circles[..., : self.block]
        if self.blocks > 1:
            body[:, :, 1:, : self.after] += circles[:, :, :-1, self.block : self.block + self.after]
            if self.before:
                body[:, :, :-1, -self.before :] += circles[:, :, 1:, -self.before :]
        return body.flatten(2)[..., : self.length]

    def underlap(self, g: Tensor, dtype: torch.dtype) -> Tensor:
        """The adjoint of :meth:`overlap`: (b l c) → (b c blocks n)."""
        circles = self.spread(g, dtype)
        if self.blocks > 1:
            body = circles[..., : self.block]
            circles[:, :, :-1, self.block : self.block + self.after] = body[:, :, 1:, : self.after]
            if self.before:
                circles[:, :, 1:, -self.before :] = body[:, :, :-1, -self.before :]
        return circles

    def wind(self, kernel: Tensor, reverse: Tensor | None) -> Tensor:
        """Taps at their lags: kernel (c l_k), reverse (c l_r) → (c n), lag -1 at the circle's end."""
        if reverse is None:
            return kernel
        between = kernel.new_zeros(len(kernel), self.size - kernel.shape[1] - reverse.shape[1])
        return torch.cat([kernel, between, reverse.flip(1)], dim=1)

    def unwind(self, taps: Tensor) -> tuple[Tensor, Tensor]:
        """The adjoint of :meth:`wind`: (c n) → (c l_k), (c l_r)."""
        return taps[:, : self.after + 1], taps[:, self.size - self.before :].flip(1)


@functools.lru_cache(maxsize=1024)  # a tenth of a millisecond, as long as a short convolution itself
def lay_out(length: int, taps: int, reverse: int) -> Circles:
    """The cheapest layout for ``length`` tokens, ``taps`` from lag 0 on and ``reverse`` from lag -1 on.

    Outputs must not wrap onto a block's other end. Of a single block, what lies outside the sequence is dropped, so
    that n ≥ l + max(l_k - 1, l_r) does; with neighbours every output counts: n ≥ s + l_k - 1 + l_r.
    """
    after = max(taps - 1, 0)
    overlap = after + reverse
    found = [Circles(length, after, reverse, length, fft_size(length + max(after, reverse)))]
    for factor in (2, 4, 8, 16):
        size = fft_size(max(factor * overlap, SHORTEST))
        block = size - overlap
        if max(after, reverse) <= block < length:  # reaches no further than the neighbours
            found.append(Circles(length, after, reverse, block, size))
    return min(found, key=lambda circles: circles.blocks * circles.size * math.log2(circles.size))


SHORTEST = 512  # points, below which an FFT's fixed costs show


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
