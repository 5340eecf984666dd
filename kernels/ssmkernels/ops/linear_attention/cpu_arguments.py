"""What linear attention's native kernels take (``cpu.h``), from tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.validate import precision
from ssmkernels.native import fields_of, plain, rows
from ssmkernels.native.kept import kept_starts
from ssmkernels.ops.linear_attention.reference import scale_of

CHUNK = 64  # tokens: a tile's states then stay in a core's first cache


def chunk_length(a: Any) -> int:
    """Tokens between saved states: so many that these take less memory than q, k and v do."""
    (groups, k), (heads, v) = a.k.shape[-2:], a.v.shape[-2:]
    row = (2 * groups * k + heads * v) * 3 // 4  # numbers a token
    return CHUNK * max(1, -(-heads * k * v // (CHUNK * max(row, 1))))


def chunks(a: Any) -> Any:
    """How many states are saved."""
    return kept_starts(a.q, a.cu_seqlens, chunk_length(a))


def kinds(log_decay: Tensor | None, batch_axes: int) -> dict[str, int]:
    """Whether there is a decay for each token, and for each channel of the key."""
    axes = 0 if log_decay is None else log_decay.ndim
    return {"per_token": axes > 1, "per_key": axes == batch_axes + 2}


def values(a: Any, starts: Tensor | None) -> tuple[dict[str, float], list[Any]]:
    """The kernel's arguments except the outputs, and the tensors that they point into."""
    wide = precision(a.q)
    q, k, v = rows(a.q), rows(a.k), rows(a.v)
    decay = None if a.log_decay is None else rows(a.log_decay.to(wide))
    bonus, initial = (None if t is None else plain(t, wide) for t in (a.bonus, a.initial_state))
    cu_seqlens = None if a.cu_seqlens is None else a.cu_seqlens.contiguous()
    if decay is not None and decay.ndim != 4:
        decay = decay.contiguous()
    pointers = {
        "q": q,
        "k": k,
        "v": v,
        "log_decay": decay,
        "bonus": bonus,
        "initial": initial,
        "cu_seqlens": cu_seqlens,
        "starts": starts,
    }
    found = fields_of(pointers, q, cu_seqlens) | {
        "heads": v.shape[2],
        "groups": k.shape[2],
        "keys": k.shape[3],
        "values": v.shape[3],
        "chunk": chunk_length(a),
        "threads": native.threads(v.numel() * k.shape[3]),
        "scale": scale_of(a.scale, k),
        **kinds(decay, 2),
    }
    for name, t in (("q", q), ("k", k), ("v", v), ("decay", decay)):
        strides = (0, 0, 0) if t is None or t.ndim == 1 else t.stride()[:3]
        found |= {f"{name}_{axis}": stride for axis, stride in zip(("batch", "time", "head"), strides, strict=True)}
    return found, list(pointers.values())
