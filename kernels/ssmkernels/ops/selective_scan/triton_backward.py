"""The selective scan's backward pass in Triton: its launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ssmkernels.core.triton_support import kernels, on_device_of
from ssmkernels.core.validate import precision
from ssmkernels.ops.selective_scan.triton_arguments import backward_options, count_groups, settled, values


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Any]:
    u, A, B, C, cu_seqlens = a.u, a.A, a.B, a.C, a.cu_seqlens
    dy, dfinal = grads.y, grads.final_state
    d, n = A.shape
    wide, groups = precision(u), count_groups(B, C)
    per_group = d // groups
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    options = backward_options(n, per_group, u.dtype)
    blocks = -(-per_group // options["BLOCK_D"])
    parts, workers = min(blocks, max(8, per_group // n)), min(sequences, max(4, 512 // options["N"]))
    programs = workers * groups * parts

    def empty(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=wide)

    du, ddelta, dz = (None if t is None else t.new_empty(t.shape) for t in (u, a.delta, a.z))
    dinitial = empty(sequences, d, n) if a.initial_state is not None else None
    dA = empty(workers, d, n)
    dD, dbias = (None if t is None else empty(workers, d) for t in (a.D, a.delta_bias))
    maps: dict[str, Any] = {}
    for name, x in (("dB", B), ("dC", C)):
        maps[name], maps[f"{name}_strides"] = _partial(x, groups, parts, workers, empty)
    if programs:
        fields = values(a, groups)
        fields |= {
            "starts": saved.starts,
            "dy": dy,
            "dy_strides": dy.stride(),
            "dfinal": None if dfinal is None else dfinal.contiguous(),
        }
        fields |= {
            "du": du,
            "ddelta": ddelta,
            "dA": dA,
            "dD": dD,
            "dz": dz,
            "dbias": dbias,
            "dinitial": dinitial,
            **maps,
        }
        fields |= {"sequences": sequences, "workers": workers, "parts": parts, "blocks": blocks, "zero": 0}
        tiles = options["CHUNK"] // options["T"]
        fields["scratch"] = empty(programs, tiles, options["BLOCK_D"], options["N"])
        with on_device_of(u):
            kernels(__package__).backward[(programs,)](**settled(fields | options))
    return {
        "u": du,
        "delta": ddelta,
        "A": dA.sum(0),
        "B": _total(maps["dB"], B),
        "C": _total(maps["dC"], C),
        "D": None if dD is None else dD.sum(0),
        "z": dz,
        "delta_bias": None if dbias is None else dbias.sum(0),
        "initial_state": dinitial,
    }


def _partial(
    x: Tensor, groups: int, parts: int, workers: int, empty: Callable[..., Tensor]
) -> tuple[Tensor, tuple[int, int, int]]:
    """Where the parts of the gradient of B or C go, (parts, ...), and the strides of a part, a group and a step."""
    if x.ndim == 2:
        return empty(workers, *x.shape), (0, 0, 0)
    b, l, n = x.shape[0], x.shape[1], x.shape[-1]
    if x.ndim == 3:  # one for all groups
        return empty(parts * groups, b, l, n), (groups * b * l * n, b * l * n, n)
    return empty(parts, b, l, groups, n), (b * l * groups * n, n, groups * n)


def _total(parts: Tensor, x: Tensor) -> Tensor:
    """The sum of the parts in x's dtype, in an order that depends on nothing."""
    if x.ndim == 2:
        return parts.sum(0).to(x.dtype)
    if parts.shape[0] == 1:
        return parts[0].to(x.dtype, copy=True)
    total = x.new_empty(x.shape)
    if total.numel():
        with on_device_of(x):
            kernels(__package__).add_parts[(-(-total.numel() // 512),)](
                parts, total, total.numel(), parts.shape[0], BLOCK=512, num_warps=4
            )
    return total
