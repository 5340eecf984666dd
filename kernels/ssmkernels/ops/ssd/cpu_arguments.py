"""What the native state-space dual's forward and backward passes take (``cpu.h``), from tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.validate import precision
from ssmkernels.native import fields_of, plain, rows, turned
from ssmkernels.native.kept import kept_starts

CHUNK = 64  # tokens: a head's matrices then stay in a core's own cache
LONGEST = 256
SEGMENT = 4  # chunks between saved states


def chunk_length(a: Any) -> int:
    """Tokens of a chunk: what the call asks for, within bounds and in whole vectors."""
    size = CHUNK if a.chunk_size is None else a.chunk_size
    return min(-(-size // 16) * 16, LONGEST)


def segments(a: Any) -> Any:
    """How many states are saved."""
    return kept_starts(a.x, a.cu_seqlens, chunk_length(a) * SEGMENT)


def side_by_side(x: Tensor) -> Tensor:
    """x (..., h, p) with heads and channels side by side."""
    beside = (x.stride(-1) == 1 or x.shape[-1] == 1) and (x.stride(-2) == x.shape[-1] or x.shape[-2] == 1)
    return x if beside else turned(x)


def values(a: Any, starts: Tensor | None) -> tuple[dict[str, float], list[Any]]:
    """The kernel's arguments except the outputs, and the tensors that they point into."""
    wide = precision(a.x)
    x, dt = side_by_side(a.x), rows(a.dt)
    z = None if a.z is None else side_by_side(a.z)
    B, C = rows(a.B), rows(a.C)
    D, dt_bias, initial = (None if t is None else plain(t, wide) for t in (a.D, a.dt_bias, a.initial_state))
    cu_seqlens = None if a.cu_seqlens is None else a.cu_seqlens.contiguous()
    batch, length, heads, p = x.shape
    pointers = {
        "x": x,
        "z": z,
        "dt": dt,
        "A": plain(a.A, wide),
        "B": B,
        "C": C,
        "D": D,
        "dt_bias": dt_bias,
        "initial": initial,
        "scale": None,
        "direct": None,
        "cu_seqlens": cu_seqlens,
        "starts": starts,
        "m": None,
        "sums": None,
    }
    found = fields_of(pointers, x, cu_seqlens) | {
        "map_dtype": native.DTYPES[B.dtype],
        "heads": heads,
        "p": p,
        "n": B.shape[3],
        "groups": B.shape[2],
        "skip": p if D is not None and D.ndim == 2 else 1,
        "softplus": a.dt_softplus,
        "chunk": chunk_length(a),
        "segment": SEGMENT,
        "rank": 1,
        "threads": native.threads(batch * length * heads * p * B.shape[3]),
        "dt_least": a.dt_limit[0],
        "dt_most": a.dt_limit[1],
        "query_scale": 1.0,
    }
    for name, t in (("x", x), ("z", z), ("dt", dt), ("B", B), ("C", C)):
        found[name + "_batch"], found[name + "_time"] = (0, 0) if t is None else t.stride()[:2]
    found["B_group"], found["C_group"] = B.stride(2), C.stride(2)
    return found, list(pointers.values())
