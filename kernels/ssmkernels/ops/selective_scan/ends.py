"""What a part of a sequence leaves in the state of a selective scan, and what it asks of the state before it.

With D_t = Δ_1 + … + Δ_t and D that of the whole part::

    backward:  E_dn = Σ_t exp(A_dn (D - D_t)_d) Δ_td u_td B_tn     what it leaves, from zero
    forward:   F_dn = Σ_t exp(A_dn D_td) x_td C_tn                 the gradient of the state before it, for that x of y
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.packing import spans
from ssmkernels.core.plain import readable
from ssmkernels.core.validate import precision

CHUNK = 2**18  # exponentials at a time


class Walk(NamedTuple):
    """The steps of packed sequences: arguments of :func:`~ssmkernels.selective_scan`, with real ``A``."""

    delta: Tensor
    delta_bias: Tensor | None
    delta_softplus: bool
    A: Tensor
    cu_seqlens: Tensor


def ends(walk: Walk, x: Tensor, maps: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """The sums above, and the decay of a state over each sequence, both ``(s, d, n)`` in float32 (float64).

    Args:
        walk: the steps.
        x: u where ``backward``, or the gradient of the scan's output, ``(1, l, d)``.
        maps: B or C, ``(1, l, n)`` or ``(1, l, g, n)``.
        backward: whether the sum is that of what is left.
    """
    maps = maps if maps.ndim == 4 else maps[:, :, None]  # (1 l g n)
    if native.missing() is None and readable(x) and x.device.type == "cpu" and walk.A.numel():
        found, total = _native(walk, x, maps, backward)
    else:
        found, total = _plain(walk, x, maps, backward)
    return found, torch.exp(walk.A.to(total.dtype) * total[..., None])


def _native(walk: Walk, x: Tensor, maps: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """By the native library (``cpu_ends.cpp``)."""
    wide, sequences = precision(x), walk.cu_seqlens.shape[0] - 1
    d, n = walk.A.shape
    dtype = x.dtype if x.dtype == walk.delta.dtype else wide
    tensors = {"x": native.rows(x.to(dtype)), "delta": native.rows(walk.delta.to(dtype))}
    maps = native.rows(maps.to(wide).flatten(2))
    strides = {f"{name}_time": t.stride(1) for name, t in (tensors | {"maps": maps}).items()}
    tensors |= {"A": walk.A.to(wide).contiguous(), "maps": maps, "cu_seqlens": walk.cu_seqlens.contiguous()}
    tensors |= {"found": x.new_empty(sequences, d, n, dtype=wide), "total": x.new_empty(sequences, d, dtype=wide)}
    bias = None if walk.delta_bias is None else walk.delta_bias.to(wide).contiguous()
    sizes = {"dtype": native.DTYPES[dtype], "sequences": sequences, "d": d, "n": n, "groups": maps.shape[2] // n}
    options = {"softplus": walk.delta_softplus, "left": backward, "threads": torch.get_num_threads()}
    addresses = {name: native.address(t) for name, t in {**tensors, "delta_bias": bias}.items()}
    native.run("selective_scan_ends", {**addresses, **sizes, **options, **strides})
    return tensors["found"], tensors["total"]


def _plain(walk: Walk, x: Tensor, maps: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """By PyTorch's operators."""
    wide = precision(x)
    A, delta = walk.A.to(wide), walk.delta[0].to(wide)
    delta = delta if walk.delta_bias is None else delta + walk.delta_bias.to(wide)
    delta = F.softplus(delta, threshold=40) if walk.delta_softplus else delta
    found, totals = [], []
    for _, span in spans(walk.cu_seqlens):
        step, own = delta[span], x[0, span].to(wide)
        distance, total = after(step) if backward else step.cumsum(0), step.sum(0)
        found.append(_sum(A, distance, own * step if backward else own, maps[0, span]))
        totals.append(total)
    return torch.stack(found), torch.stack(totals)


def after(x: Tensor) -> Tensor:
    """The sum of what comes after each row of x ``(l, …)``; by itself, so that small ones keep their digits."""
    return torch.cat([x[1:].flip(0).cumsum(0).flip(0), torch.zeros_like(x[:1])])


def _sum(A: Tensor, distance: Tensor, x: Tensor, maps: Tensor) -> Tensor:
    """Σ_t exp(A distance_t) x_t maps_t: A (d n), distance and x (l d), maps (l g n) → (d n)."""
    (d, n), g = A.shape, maps.shape[1]
    total = torch.zeros_like(A)
    size = max(1, CHUNK // max(1, A.numel()))
    for t in range(0, len(x), size):
        rows = slice(t, t + size)
        weights = torch.exp(distance[rows, :, None] * A).mul_(x[rows, :, None]).view(-1, g, d // g, n)
        total += torch.einsum("lgcn,lgn->gcn", weights, maps[rows].to(x.dtype)).reshape(d, n)
    return total
