"""The native state-space dual's backward pass (``cpu_backward.cpp``)."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.native import address, plain
from ssmkernels.ops.ssd.cpu_arguments import values

BLOCK = 4  # heads whose gradients of B and C are added in one part: kBlock in cpu.h


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor | None]:
    fields, _kept = values(a, saved.starts)
    return gradients(a, fields, grads)


def gradients(
    a: Any, fields: dict[str, float], grads: Any, also: tuple[str, ...] = (), by_head: bool = False
) -> dict[str, Tensor | None]:
    """Of all arguments of a call whose forward pass takes ``fields``.

    Args:
        also: which of scale, direct and m the fields have, whose gradients ``(b, l, h)`` are returned too.
        by_head: whether the gradients of B and C lie head by head, (b g l n).
    """
    wide = precision(a.x)
    batch, length, heads, _ = a.x.shape
    s, (groups, n) = int(fields["sequences"]), a.B.shape[2:]
    parts = -(-(heads // groups) // BLOCK)
    dy = grads.y.contiguous()
    dfinal = None if grads.final_state is None else plain(grads.final_state, wide)

    empty = functools.partial(a.x.new_empty, dtype=wide)

    dx = a.x.new_empty(a.x.shape)
    dz = None if a.z is None else a.x.new_empty(a.x.shape)
    ddt = empty((batch, length, heads))
    maps = wide if parts > 1 else a.B.dtype  # parts are added before they are rounded
    shape = (parts, batch, groups, length, n) if by_head else (parts, batch, length, groups, n)
    dB, dC = (a.x.new_empty(shape, dtype=maps) for _ in range(2))
    # Sums of several parts lie apart, as a view would keep all parts alive
    sums = [a.x.new_empty(shape[1:], dtype=maps) if parts > 1 else None for _ in range(2)]
    if by_head:
        dB, dC, *sums = (None if t is None else t.transpose(-3, -2) for t in (dB, dC, *sums))
    strides = dict(zip(("map_part", "map_batch", "map_time", "map_group"), dB.stride(), strict=False))
    dscale, ddirect, dm = (empty(ddt.shape) if name in also else None for name in ("scale", "direct", "m"))
    # Of no sequence at all the sums are 0
    per_sequence = a.x.new_empty if s else a.x.new_zeros
    dA, dbias = (per_sequence((max(s, 1), heads), dtype=wide) for _ in range(2))
    dD = per_sequence((max(s, 1), heads, int(fields["p"])), dtype=wide)
    dinitial = None if a.initial_state is None else empty(a.initial_state.shape)
    large_pages(dx, dz, dB, dC, *sums)
    outputs = {"dx": dx, "dz": dz, "ddt": ddt, "dB": dB, "dC": dC, "dA": dA, "dD": dD, "dbias": dbias}
    outputs |= {"dinitial": dinitial, "dy": dy, "dfinal": dfinal}
    outputs |= {"dscale": dscale, "ddirect": ddirect, "dm": dm, "dB_sum": sums[0], "dC_sum": sums[1]}
    found = {"dmap_dtype": native.DTYPES[maps]} | strides | {name: address(t) for name, t in outputs.items()}
    native.run("ssd_backward", {"y": 0, "final_state": 0} | fields | found)
    dB, dC = sums if parts > 1 else (dB[0], dC[0])
    return {
        "x": dx,
        "dt": ddt,
        "A": dA[0],
        "B": dB,
        "C": dC,
        "z": dz,
        "dt_bias": dbias[0],
        "D": dD[0] if a.D is None or a.D.ndim == 2 else dD[0].sum(-1),
        "initial_state": dinitial,
        "scale": dscale,
        "direct": ddirect,
        "m": dm,
    }
