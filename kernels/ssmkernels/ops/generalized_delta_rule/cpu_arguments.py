"""What the native general delta rule takes (``cpu.h``), from tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.validate import precision
from ssmkernels.native import fields_of, plain
from ssmkernels.native.kept import kept_row
from ssmkernels.ops.generalized_delta_rule.reference import scale_of
from ssmkernels.ops.ssd.cpu_arguments import side_by_side

ACTIVATIONS = ("q", "k", "v", "a", "b")


def segment_length(keys: int, values: int, row: int | None = None) -> int:
    """Tokens between saved states, which then take less memory than q, k and v of these tokens.

    Args:
        row: numbers of a state's row as it is saved, as wide as those of v; as many as v has if None.
    """
    return max(32, -(-keys * (row or values) // (2 * keys + values) // 16) * 16)


def tokens(a: Any) -> int:
    """Those of a segment of a call here, whose saved states are compact beside half precision."""
    values = a.v.shape[3]
    return segment_length(a.q.shape[3], values, kept_row(values, a.q)[0])


def segments(a: Any, tokens: int) -> Any:
    """How many states are saved. Packed, sequence i's start at number cu_seqlens[i] // tokens + i."""
    batch, length = a.q.shape[:2]
    if a.cu_seqlens is None:
        return batch * -(-length // tokens)
    return length // tokens + a.cu_seqlens.shape[0] - 1


def values(a: Any, starts: Tensor | None) -> tuple[dict[str, float], list[Any]]:
    """The kernel's arguments except the outputs, and the tensors that they point into."""
    wide = precision(a.q)
    timed = {name: side_by_side(getattr(a, name)) for name in ACTIVATIONS}
    g = None if a.log_decay is None else side_by_side(a.log_decay.to(wide))
    initial = None if a.initial_state is None else plain(a.initial_state, wide)
    cu_seqlens = None if a.cu_seqlens is None else a.cu_seqlens.contiguous()
    batch, length, heads, keys = a.q.shape
    pointers = timed | {"log_decay": g, "initial": initial, "cu_seqlens": cu_seqlens, "starts": starts}
    found = fields_of(pointers, a.q, cu_seqlens) | {
        "heads": heads,
        "keys": keys,
        "values": a.v.shape[3],
        "segment": min(tokens(a), max(length, 1)),
        "threads": native.threads(batch * length * heads * keys * a.v.shape[3]),
        "scale": scale_of(a.q, a.scale),
    }
    for name, t in (timed | {"g": g}).items():
        found[name + "_batch"], found[name + "_time"] = (0, 0) if t is None else t.stride()[:2]
    return found, list(pointers.values())
