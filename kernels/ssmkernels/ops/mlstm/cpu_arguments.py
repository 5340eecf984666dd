"""The gates of the native matrix memory (``cpu_gates.cpp``), and the call of the state-space dual's kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.validate import precision
from ssmkernels.native import address, plain
from ssmkernels.ops.mamba3_scan.cpu_arguments import Core
from ssmkernels.ops.mlstm.surroundings import recurrence
from ssmkernels.ops.ssd.cpu_arguments import CHUNK, values


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


def core(a: Any, g: Gates, starts: Tensor | None) -> tuple[Core, dict[str, float], list[Any]]:
    """The call of the state-space dual, its fields, and the tensors that they point into."""
    call = recurrence(a, a.k, a.q, g.decay, CHUNK)
    fields, kept = values(call, starts)
    fields |= {"scale": g.weight.data_ptr(), "direct": g.weight.data_ptr()}
    return call, fields, [*kept, g]
