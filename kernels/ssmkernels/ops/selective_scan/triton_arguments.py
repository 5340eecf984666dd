"""What the selective scan's Triton kernels take of the arguments, and their launch settings."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels.core.triton_support import all_registers, next_power_of_2
from ssmkernels.core.validate import precision


class Dims(NamedTuple):
    """The constants of the kernels, in one argument.

    Attributes:
        n, N: states of a channel, and these rounded up to a power of two.
        SOFTPLUS, FIXED_B, FIXED_C: what the call is like.
        CHUNK, T, BLOCK_D: steps between saved states, steps that are loaded together, and channels of a program.
    """

    n: int
    N: int
    SOFTPLUS: bool
    FIXED_B: bool
    FIXED_C: bool
    CHUNK: int
    T: int
    BLOCK_D: int


def settled(fields: dict[str, Any]) -> dict[str, Any]:
    """A launch's fields with the constants in one."""
    found = {name: x for name, x in fields.items() if name not in Dims._fields}
    return found | {"dims": Dims(**{name: fields[name] for name in Dims._fields})}


def values(a: Any, groups: int) -> dict[str, Any]:
    """What all kernels take of the arguments."""
    u, A = a.u, a.A
    wide = precision(u)
    D, delta_bias = (None if t is None else t.to(wide).contiguous() for t in (a.D, a.delta_bias))
    least = torch.finfo(wide).min  # times a step of 0 it is 0, and -∞ NaN
    A2 = (A.to(wide) / math.log(2)).clamp(min=least).contiguous()
    found: dict[str, Any] = {"u": u, "delta": a.delta, "z": a.z, "A2": A2, "D": D, "bias": delta_bias}
    for name, x in (("u", u), ("delta", a.delta), ("z", a.z)):
        found[f"{name}_strides"] = (0, 0, 0) if x is None else x.stride()
    for name, x in (("B", a.B), ("C", a.C)):
        fixed = x.ndim == 2
        if fixed:
            x = x.to(wide).contiguous()
        elif x.ndim == 3:
            x = x.unsqueeze(2).expand(-1, -1, groups, -1)
        found |= {name: x, f"{name}_strides": (0, 0, 0, 0) if fixed else x.stride(), f"FIXED_{name}": fixed}
    return found | {
        "cu_seqlens": None if a.cu_seqlens is None else a.cu_seqlens.contiguous(),
        "length": u.shape[1],
        "per_group": A.shape[0] // groups,
        "d": A.shape[0],
        "n": A.shape[1],
        "SOFTPLUS": a.delta_softplus,
    }


def count_groups(B: Tensor, C: Tensor) -> int:
    """The groups of channels: those of B or of C, 1 where neither has any."""
    return max(t.shape[2] if t.ndim == 4 else 1 for t in (B, C))


def chunk_length(n: int) -> int:
    """Steps between saved states: these, n numbers a channel, take no more memory than one activation in float32."""
    return max(64, next_power_of_2(n))


def forward_options(n: int, per_group: int, dtype: torch.dtype) -> dict[str, Any]:
    """Launch settings: four states a thread, where n allows it."""
    N = next_power_of_2(n)
    warps = 1 if N <= 32 else 4
    block = min(next_power_of_2(per_group), 64, max(1, 128 * warps // N))
    return _options(N, block, warps, T=2 if dtype == torch.float64 else 8)


def backward_options(n: int, per_group: int, dtype: torch.dtype) -> dict[str, Any]:
    """Launch settings: four states a thread, where n allows it; two in float64."""
    N = next_power_of_2(n)
    block = min(next_power_of_2(per_group), 32 if N <= 4 else 16 if N == 8 else 8 if N <= 64 else 4)
    double = dtype == torch.float64
    return _options(N, block, max(1, block * N // (64 if double else 128)), T=1 if double else 2)


def _options(N: int, block: int, warps: int, T: int) -> dict[str, Any]:
    return {"CHUNK": chunk_length(N), "N": N, "T": T, "BLOCK_D": block, "num_warps": warps, **all_registers()}
