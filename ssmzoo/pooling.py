"""From the outputs of all tokens to one vector a sequence, ``(b, l, d) → (s, d)``."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.core.crossing import current


def first(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Each sequence's first token."""
    over = current()
    if over is not None:
        return over.picked(x, last=False)
    _check_no_empty(x, cu_seqlens, "pooling: first")
    return x[:, 0] if cu_seqlens is None else x[0, cu_seqlens[:-1].long()]


def last(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Each sequence's last token."""
    over = current()
    if over is not None:
        return over.picked(x, last=True)
    _check_no_empty(x, cu_seqlens, "last_only")
    return x[:, -1] if cu_seqlens is None else x[0, cu_seqlens[1:].long() - 1]


def total(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum over each sequence's tokens, in float32 or wider, and how many they are, int64 ``(s)``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if cu_seqlens is None:
        return x.sum(1, dtype=wide), torch.full((x.shape[0],), x.shape[1], device=x.device)
    lengths = cu_seqlens.diff().long()
    summed, over = torch.segment_reduce(x[0].to(wide), "sum", lengths=lengths), current()
    return (summed, lengths) if over is None else (over.total(summed), over.totals)


def _check_no_empty(x: Tensor, cu_seqlens: Tensor | None, what: str) -> None:
    if x.shape[1] == 0 or (cu_seqlens is not None and bool((cu_seqlens.diff() == 0).any())):
        raise ValueError(f"SequenceModel: `{what}` needs at least one token in every sequence of `inputs`")
