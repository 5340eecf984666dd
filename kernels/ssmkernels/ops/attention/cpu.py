"""Attention in the native CPU library, in which each query sees one run of the keys (``cpu_runs.h``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.plain import readable
from ssmkernels.native import missing
from ssmkernels.ops.attention import native
from ssmkernels.ops.attention.native import SAVES, empty

__all__ = ["SAVES", "backward", "empty", "forward", "missing", "unsupported"]


def unsupported(a: Any) -> str | None:
    options = {
        "softcap": a.softcap > 0,
        "ALiBi": a.alibi_slopes is not None,
        "sinks": a.sinks is not None,
        "block masks": a.block_offsets is not None,
        "packed sequences": a.cu_seqlens is not None,
    }
    for option, asked in options.items():
        if asked:
            return f"the native kernel has no {option}"
    if a.q_positions is not None and not (_rising(a.q_positions) and _rising(a.k_positions)):
        return "the native kernel takes rising positions alone"
    return native.unsupported(a)


def forward(a: Any, save: bool) -> tuple[Tensor, ...]:
    return native.forward("attention", a, save, a.k.shape[2], _keys(a), **_runs(a))


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor | None]:
    found = native.backward("attention_backward", a, saved, grads, a.k.shape[2], _keys(a), **_runs(a))
    return {**found, "alibi_slopes": None, "sinks": None}


def _rising(positions: Tensor) -> bool:
    """Whether they are known never to fall; under a compiler nobody can read them."""
    return readable(positions) and bool((positions[:, 1:] >= positions[:, :-1]).all())


def _keys(a: Any) -> int:
    m: int = a.k.shape[1]
    return m if a.left < 0 or a.right < 0 else min(m, a.left + a.right + 1)


def _runs(a: Any) -> dict[str, Any]:
    """The first key that each query sees, and the one after the last, int32 ``(l)`` or ``(b, l)``."""
    l, m = a.q.shape[1], a.k.shape[1]
    if a.q_positions is None:
        place = torch.arange(m - l, m, dtype=torch.int32)
        firsts = (place - a.left).clamp(0, m) if a.left >= 0 else torch.zeros_like(place)
        ends = (place + a.right + 1).clamp(0, m) if a.right >= 0 else torch.full_like(place, m)
    else:
        place, keys = a.q_positions.contiguous(), a.k_positions.contiguous()
        firsts, ends = torch.zeros_like(place), torch.full_like(place, m)
        if a.left >= 0:
            firsts = torch.searchsorted(keys, place - a.left, out_int32=True)
        if a.right >= 0:
            ends = torch.searchsorted(keys, place + a.right, right=True, out_int32=True)
    return {"firsts": firsts, "ends": ends, "run_batch": 0 if firsts.ndim == 1 else l}
