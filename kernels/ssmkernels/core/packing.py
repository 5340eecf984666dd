"""Packed batches: several sequences one after another in a batch of one, with their borders in ``cu_seqlens``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def spans(cu_seqlens: Tensor) -> Iterator[tuple[int, slice]]:
    """Number and time slice of each sequence. Reads ``cu_seqlens`` on the host."""
    borders = cu_seqlens.tolist()
    for i, (start, end) in enumerate(zip(borders, borders[1:], strict=False)):
        yield i, slice(start, end)


def pad(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Where each position of a padded batch ``(s, longest)`` comes from.

    Returns:
        (index, mask): int64 positions in the packed batch, 0 where there is padding, and bool, True where there is a
        token; both ``(s, longest)``. ``x[0, index]`` pads, ``padded[mask]`` packs again.
    """
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    offset = torch.arange(longest, device=cu_seqlens.device)
    mask = offset < lengths[:, None]
    index = torch.where(mask, cu_seqlens[:-1, None] + offset, 0)
    return index.long(), mask


def longest(length: int, cu_seqlens: Tensor | None) -> int:
    """The length of the longest sequence; of all of them together in compiled code, which reads no borders."""
    if cu_seqlens is None or len(cu_seqlens) < 2 or torch.compiler.is_compiling():
        return length
    return int(cu_seqlens.diff().max())


def last_of_each(x: Tensor, cu_seqlens: Tensor, count: int) -> Tensor:
    """The last ``count`` rows of each sequence in ``x (l, d)``, zeros before its first: ``(s, count, d)``."""
    source = cu_seqlens[1:, None] + torch.arange(-count, 0, device=x.device)  # (s count)
    inside = source >= cu_seqlens[:-1, None]
    rows = x[torch.where(inside, source, 0)] if len(x) else x.new_zeros(*source.shape, x.shape[1])
    return torch.where(inside[..., None], rows, 0)
