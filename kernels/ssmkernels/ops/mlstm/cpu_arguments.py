"""The matrix memory as the native state-space dual takes it (``ssd/cpu.h``).

With m of the recurrence known (``cpu_gates.cpp``), C and n are one linear recurrence: the values' columns, and one more
of ones, are inputs, keys and queries its maps, and each token is scaled by exp(i - m).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.native import address, plain
from ssmkernels.ops.mamba3_scan.cpu_arguments import Core
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
    wide = precision(a.q)
    x = a.v.new_empty((*a.v.shape[:-1], a.v.shape[-1] + 1), dtype=wide)
    large_pages(x)
    x[..., :-1] = a.v
    x[..., -1] = 1
    call = Core(
        x=x,
        dt=g.decay,
        A=g.decay.new_ones(g.decay.shape[2]),
        B=a.k,
        C=a.q,
        D=None,
        z=None,
        dt_bias=None,
        dt_softplus=False,
        dt_limit=(-math.inf, math.inf),
        chunk_size=CHUNK,
        initial_state=initial_state(a),
        cu_seqlens=a.cu_seqlens,
    )
    fields, kept = values(call, starts)
    fields |= {"scale": g.weight.data_ptr(), "direct": g.weight.data_ptr()}
    return call, fields, [*kept, g]


def initial_state(a: Any) -> Tensor | None:
    """C and n, transposed and one below the other, ``(s, h, v + 1, k)``; None where both are 0."""
    if a.initial_C is None and a.initial_n is None:
        return None
    C, n = a.initial_C, a.initial_n
    like = C[..., 0] if n is None else n
    C = like.new_zeros((*like.shape, a.v.shape[-1])) if C is None else C
    n = torch.zeros_like(like) if n is None else n
    return torch.cat([C.mT, n[..., None, :]], dim=2)
