"""Packed sequences laid out with a gap before each, as a convolution over all of them at once needs it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmkernels.core.validate import precision


@dataclasses.dataclass
class Places:
    """Where tokens stand once ``gap`` places precede every sequence: for the inputs before it, or zeros.

    Attributes:
        tokens: int64 ``(l)``; None without packing, where they follow one gap.
        gaps: int64 ``(s, gap)``, likewise.
        ends: int64 ``(s, gap)``, the last places of each sequence, some of its gap among them if it is short.
    """

    gap: int
    tokens: Tensor | None = None
    gaps: Tensor | None = None
    ends: Tensor | None = None

    @classmethod
    def of(cls, gap: int, length: int, cu_seqlens: Tensor | None) -> Places:
        if cu_seqlens is None:
            return cls(gap)
        borders, device = cu_seqlens.long(), cu_seqlens.device
        position = torch.arange(length, device=device)
        before = torch.searchsorted(borders[1:], position, right=True)  # how many sequences end before a token
        first = borders + gap * torch.arange(len(borders), device=device)
        within = torch.arange(gap, device=device)
        return cls(gap, position + gap * (before + 1), first[:-1, None] + within, first[1:, None] - gap + within)

    def spread(self, u: Tensor, before: Tensor | None) -> Tensor:
        """(b l d) → (b gap+l d), packed (1 s·gap+l d)."""
        if self.tokens is None or self.gaps is None:
            return F.pad(u, (0, 0, self.gap, 0)) if before is None else torch.cat([before.to(u.dtype), u], dim=1)
        out = u.new_zeros(1, u.shape[1] + self.gaps.numel(), u.shape[2]).index_copy(1, self.tokens, u)
        return out if before is None else out.index_copy(1, self.gaps.flatten(), before.to(u.dtype).flatten(0, 1)[None])

    def gather(self, y: Tensor) -> Tensor:
        """The tokens again, of what :meth:`spread` gave less its first gap."""
        return y if self.tokens is None else y.index_select(1, self.tokens - self.gap)

    def last(self, spread: Tensor) -> Tensor:
        """(s gap d) of what :meth:`spread` gave, float32 (float64)."""
        rows = spread[:, spread.shape[1] - self.gap :].clone() if self.ends is None else spread[0, self.ends]
        return rows.to(precision(spread))
