"""Whole sequences of some channels in place of some tokens of all channels, by one all-to-all, and back.

As in DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509), whose channels are heads of attention. No process
holds more numbers than before, where channels divide by the processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.parallel.layout import Layout, moves, take
from ssmzoo.parallel.line import Line
from ssmzoo.parallel.share import share


def to_channels(line: Line, layout: Layout, tensors: list[Tensor]) -> list[Tensor]:
    """Each ``(l, d)`` of this process's tokens → ``(L, d_r)`` of whole sequences, one after another."""
    l, ranks = len(tensors[0]), line.ranks
    shares = [[share(t.shape[1], r, ranks) for t in tensors] for r in range(ranks)]
    sizes = [_width(part) for part in shares[line.rank]]
    parts = [torch.cat([t[:, s] for t, s in zip(tensors, part, strict=True)], dim=1).flatten() for part in shares]
    lengths, width = [layout.rows(r)[-1] for r in range(ranks)], sum(sizes)
    came = line.exchange(
        torch.cat(parts), [l * sum(map(_width, part)) for part in shares], [n * width for n in lengths]
    )
    everything = [[(0, sum(layout.totals))]] * ranks
    order = moves([layout.spans(r) for r in range(ranks)], everything, line.rank).order
    return list(take(came.view(-1, width) if width else came.new_empty(sum(lengths), 0), order).split(sizes, dim=1))


def to_tokens(line: Line, layout: Layout, y: Tensor, channels: int) -> Tensor:
    """y ``(L, d_r)`` → ``(l, d)``."""
    ranks, width = line.ranks, y.shape[1]
    spans = [layout.spans(r) for r in range(ranks)]
    l, sizes = layout.rows(line.rank)[-1], [_width(share(channels, r, ranks)) for r in range(ranks)]
    sends = [sum(b - a for a, b in part) * width for part in spans]
    came = line.exchange(torch.cat([take(y, part) for part in spans]).flatten(), sends, [l * size for size in sizes])
    parts = came.split([l * size for size in sizes])
    return torch.cat([part.view(l, size) for part, size in zip(parts, sizes, strict=True)], dim=1)


def _width(part: slice) -> int:
    return int(part.stop - part.start)
