"""The selective scan's backward pass in Triton: its launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.triton_support import kernels, on_device_of
from ssmkernels.core.validate import precision
from ssmkernels.ops.selective_scan.triton_arguments import backward_options, count_groups, values


def _scan_backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    has_initial_state: bool,
    cu_seqlens: Tensor | None,
    starts: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
) -> list[Tensor]:
    """Gradients of u, delta, A, B, C, then of those of D, z, delta_bias and the initial state that are given."""
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

    du, ddelta, dz = (None if t is None else t.new_empty(t.shape) for t in (u, delta, z))
    dinitial = empty(sequences, d, n) if has_initial_state else None
    dA = empty(workers, d, n)
    dD, dbias = (None if t is None else empty(workers, d) for t in (D, delta_bias))
    maps: dict[str, Any] = {}
    for name, x in (("dB", B), ("dC", C)):
        maps[name], strides = _partial(x, groups, parts, workers, empty)
        maps |= {f"{name}_{axis}": stride for axis, stride in zip(("part", "group", "time"), strides, strict=True)}
    if programs:
        fields = values(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, groups)
        fields |= {"starts": starts, "dy": dy, "dfinal": None if dfinal is None else dfinal.contiguous(), "dz": dz}
        fields |= dict(zip(("dy_batch", "dy_time", "dy_d"), dy.stride(), strict=True))
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
            kernels(__package__).backward[(programs,)](**fields, **options)
    found = [du, ddelta, dA.sum(0).to(A.dtype), _total(maps["dB"], B), _total(maps["dC"], C)]
    found.append(None if dD is None or D is None else dD.sum(0).to(D.dtype))
    found.append(dz)
    found.append(None if dbias is None or delta_bias is None else dbias.sum(0).to(delta_bias.dtype))
    return [t for t in (*found, dinitial) if t is not None]


scan_backward = torch.library.custom_op("ssmkernels::selective_scan_triton_backward", _scan_backward, mutates_args=())


@scan_backward.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, has_initial_state, cu_seqlens, starts, dy, dfinal):
    found = [t.new_empty(t.shape) for t in (u, delta, A, B, C, D, z, delta_bias) if t is not None]
    if has_initial_state:
        s = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        found.append(u.new_empty((s, *A.shape), dtype=precision(u)))
    return found


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
