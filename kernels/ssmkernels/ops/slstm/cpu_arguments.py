"""What the native scalar memory's kernels take (``cpu.h``), from tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.validate import precision
from ssmkernels.native import fields_of, plain
from ssmkernels.ops.slstm.saved import PARTS


def values(a: Any, x: Tensor, states: list[Tensor | None], cu_seqlens: Tensor | None) -> tuple[dict[str, float], Any]:
    """The kernels' arguments except the outputs, for x ``(b, l, 4, h, p)``; and the tensors that they point into.

    Args:
        states: c, n, h and m before the first token.
    """
    wide = precision(x)
    x = x if x.numel() == 0 or x[0, 0].is_contiguous() else x.contiguous()
    batch, _, _, heads, p = x.shape
    if any(state is not None for state in states):
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        states = [x.new_zeros((sequences, heads, p), dtype=wide) if s is None else s.contiguous() for s in states]
    tensors: dict[str, Tensor | None] = {"x": x, "R": plain(a.R, wide), **dict(zip(PARTS, states, strict=True))}
    tensors["bias"] = None if a.bias is None else plain(a.bias, wide)
    tensors["cu_seqlens"] = None if cu_seqlens is None else cu_seqlens.contiguous()
    found = fields_of(tensors, x, cu_seqlens) | {
        "heads": heads,
        "p": p,
        "threads": native.threads(4 * x.numel() * p),
        "x_batch": x.stride(0),
        "x_time": x.stride(1),
    }
    return found, tensors
