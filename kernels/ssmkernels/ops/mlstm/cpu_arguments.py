"""The gates of the native matrix memory (``cpu_gates.cpp``), and the call of the state-space dual's kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.validate import HALF, precision
from ssmkernels.native import address, plain
from ssmkernels.native.kept import kept_row
from ssmkernels.ops.mamba3_scan.cpu_arguments import Core
from ssmkernels.ops.mlstm.reference import scale_of
from ssmkernels.ops.mlstm.surroundings import recurrence
from ssmkernels.ops.ssd.cpu_arguments import values

CHUNK = 48  # tokens: eight times the rows of a product's tile; heads are wider than most of the dual's
EVERY = 80  # tokens of a chunk where every state is saved: few enough states, and none is computed twice
MOST = 1.0  # saved states against queries, keys and values
NARROW = 32  # keys and values of a head, for which the matrices over two tokens are what takes the time


def chunk_length(a: Any) -> int:
    """Tokens of a chunk."""
    return 16 if _narrow(a) else EVERY if _keeps_all(a) else CHUNK


def segment(a: Any) -> int:
    """Chunks between saved states: one where those fit, as to compute states again takes longer than to keep them, or
    two; four of large ones."""
    if _narrow(a):
        return 2 if _fits(a, 32) else 4
    return 1 if _keeps_all(a) else 2 if _fits(a, 2 * CHUNK) else 4


def _keeps_all(a: Any) -> bool:
    """Whether every state is saved: not beside inputs in half precision, which take so little memory themselves."""
    return a.q.dtype not in HALF and _fits(a, EVERY)


def _narrow(a: Any) -> bool:
    return bool(a.k.shape[3] + a.v.shape[3] <= NARROW)


def _fits(a: Any, tokens: int) -> bool:
    """Whether a state saved before every so many tokens takes at most MOST of their queries, keys and values."""
    keys, values = a.k.shape[3], a.v.shape[3]
    row, _ = kept_row(values + 1, a.q)
    return bool(keys * row <= MOST * tokens * (2 * keys + values))


class Gates(NamedTuple):
    """``m``, ``decay`` (a logarithm) and ``weight`` are ``(b, l, h)``, ``final_m`` is ``(s, h)``."""

    m: Tensor
    decay: Tensor
    weight: Tensor
    final_m: Tensor


def gate_fields(a: Any) -> tuple[dict[str, float], list[Any]]:
    """What the gates' kernels take of the arguments, forward and backward, and the tensors that they point into."""
    wide = precision(a.q)
    batch, length, heads = a.i.shape
    tensors: dict[str, Tensor | None] = {"i": plain(a.i, wide), "f": plain(a.f, wide)}
    for name, t in (("initial", a.initial_m), ("cu_seqlens", a.cu_seqlens)):
        tensors[name] = None if t is None else t.contiguous()
    fields: dict[str, float] = {name: address(t) for name, t in tensors.items()}
    fields |= {
        "dtype": native.DTYPES[wide],
        "sequences": batch if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1,
        "length": length,
        "heads": heads,
        "threads": native.threads(16 * a.i.numel()),
    }
    return fields, list(tensors.values())


def gates(a: Any) -> Gates:
    fields, _kept = gate_fields(a)
    empty = a.q.new_empty
    m, decay, weight = (empty(a.i.shape, dtype=precision(a.q)) for _ in range(3))
    final_m = empty((int(fields["sequences"]), a.i.shape[2]), dtype=m.dtype)
    found = Gates(m, decay, weight, final_m)
    native.run("mlstm_gates", fields | {name: t.data_ptr() for name, t in found._asdict().items()})
    return found


def core(a: Any, g: Gates, starts: Tensor | None, sums: Tensor) -> tuple[Core, dict[str, float], list[Any]]:
    """The call of the state-space dual that divides its outputs, its fields, and the tensors that they point into."""
    call = recurrence(a, a.v, a.k, a.q, g.decay, chunk_length(a))
    fields, kept = values(call, starts)
    own = {"scale": g.weight, "m": g.m, "sums": sums}
    fields |= {name: t.data_ptr() for name, t in own.items()}
    fields |= {"segment": segment(a), "p": a.v.shape[3] + 1, "query_scale": scale_of(a.scale, a.q)}
    return call, fields, [*kept, g]
