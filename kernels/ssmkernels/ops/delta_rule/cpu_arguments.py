"""What the native delta rule's kernels take (``cpu.h``), from tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.validate import precision
from ssmkernels.native import fields_of, plain, rows
from ssmkernels.native.kept import kept_row
from ssmkernels.ops.delta_rule.reference import scale_of

CHUNK = 64  # tokens: kChunk in cpu.h


def segment(k: Tensor, v: Tensor) -> int:
    """Chunks between saved states: four, as the fewer they are the less is computed again.

    More where heads share keys or are wide, and states and errors would take more memory than queries, keys and values.
    """
    (groups, keys), (heads, values) = k.shape[-2:], v.shape[-2:]
    row, _ = kept_row(values, v)
    room = 2 * keys * groups / heads + values - row  # numbers of a token and head
    return next((chunks for chunks in (4, 8) if keys * row <= room * chunks * CHUNK), 16)


def segments(a: Any) -> Any:
    """How many states are saved. Packed, sequence i's start at number cu_seqlens[i] // tokens + i."""
    tokens, (batch, length) = segment(a.k, a.v) * CHUNK, a.q.shape[:2]
    if a.cu_seqlens is None:
        return batch * -(-length // tokens)
    return length // tokens + a.cu_seqlens.shape[0] - 1


def values(
    a: Any, outputs: dict[str, Tensor], initial: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[dict[str, float], list[Any]]:
    """The arguments of the forward pass or the step, and the tensors that they point into.

    Args:
        a: the op's arguments, or the step's.
        outputs: o, final_state, starts and errors, as far as there are any.
        initial: the states before the first token.
        cu_seqlens: borders of packed sequences.
    """
    wide = precision(a.q)
    q, k, v = (rows(t if t.ndim == 4 else t.unsqueeze(1)) for t in (a.q, a.k, a.v))
    decay, initial = (None if t is None else plain(t, wide) for t in (a.log_decay, initial))
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    batch, length, heads, size = v.shape
    groups, keys = k.shape[2:]
    pointers = {
        "q": q,
        "k": k,
        "v": v,
        "beta": plain(a.beta, wide),
        "decay": decay,
        "initial": initial,
        "cu_seqlens": cu_seqlens,
        "o": outputs.get("o"),
        "final_state": outputs.get("final_state"),
        "starts": outputs.get("starts"),
        "errors": outputs.get("errors"),
    }
    found = fields_of(pointers, q, cu_seqlens) | {
        "heads": heads,
        "groups": groups,
        "keys": keys,
        "values": size,
        "channels": keys if decay is not None and decay.ndim > a.beta.ndim else 1,
        "segment": 4 if outputs.get("starts") is None else segment(k, v),
        "threads": native.threads(batch * length * heads * keys * size),
        "scale": scale_of(a.scale, keys),
    }
    for name, t in (("q", q), ("k", k), ("v", v)):
        found[name + "_batch"], found[name + "_time"], found[name + "_head"] = t.stride()[:3]
    return found, list(pointers.values())
