"""What the native scan's forward and backward passes take (``cpu.h``, ``cpu_windows.h``), from tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.validate import precision
from ssmkernels.native import address, rows


def kernel(A: Tensor, suffix: str = "") -> str:
    """The kernel's name: those of complex states are others."""
    return "selective_scan" + "_complex" * A.is_complex() + suffix


def numbers(u: Tensor, A: Tensor) -> torch.dtype:
    """The dtype of states, and of A, B and C inside a kernel."""
    return torch.promote_types(precision(u), A.dtype)


def reals(x: Tensor) -> Tensor:
    """Complex numbers as the reals that they lie in memory as, side by side on the last axis; reals as they are."""
    return torch.view_as_real(x.resolve_conj()).flatten(-2) if x.is_complex() else x


def maps(B: Tensor, C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """B and C as the kernels take them. A complex state stands for its conjugate too: that doubles its part of y."""
    return reals(B.to(dtype)), reals(C.to(dtype)) * 2 if dtype.is_complex else C.to(dtype)


def chunk_length(A: Tensor) -> int:
    """Steps between saved states, which take at most half as much memory as one activation; all of it if complex."""
    n = A.shape[1] * (2 if A.is_complex() else 1)
    return min(max(64, 4 * n // 64 * 64), 512)


def values(a: Any, starts: Tensor | None) -> tuple[dict[str, int], list[Any]]:
    """The kernel's arguments except the outputs, and the tensors that they point into."""
    wide, dtype = precision(a.u), numbers(a.u, a.A)
    u, delta = rows(a.u), rows(a.delta)
    z = None if a.z is None else rows(a.z)
    B, C = (_map(t) for t in maps(a.B, a.C, dtype))
    A = reals(a.A.to(dtype)).contiguous()
    initial_state = None if a.initial_state is None else reals(a.initial_state.to(dtype)).contiguous()
    D, delta_bias = (None if t is None else t.to(wide).contiguous() for t in (a.D, a.delta_bias))
    cu_seqlens = None if a.cu_seqlens is None else a.cu_seqlens.contiguous()
    pointers = {
        "u": u,
        "delta": delta,
        "z": z,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "delta_bias": delta_bias,
        "initial": initial_state,
        "cu_seqlens": cu_seqlens,
        "starts": starts,
    }
    found = {name: address(t) for name, t in pointers.items()}
    found |= {
        "dtype": native.DTYPES[u.dtype],
        "sequences": u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        "length": u.shape[1],
        "d": A.shape[0],
        "n": A.shape[1],
        "groups": max(t.shape[2] if t.ndim == 4 else 1 for t in (B, C)),
        "softplus": a.delta_softplus,
        "fixed_B": B.ndim == 2,
        "fixed_C": C.ndim == 2,
        "chunk": chunk_length(a.A),
        "threads": torch.get_num_threads(),
    }
    for name, t in (("u", u), ("delta", delta), ("z", z), ("B", B), ("C", C)):
        found[name + "_batch"], found[name + "_time"] = (0, 0) if t is None else t.stride()[:2]
    return found, list(pointers.values())


def _map(x: Tensor) -> Tensor:
    """B or C with its groups and states side by side."""
    if x.ndim == 3:
        return rows(x)
    groups = x.ndim == 4 and (x.stride(3) == 1 or x.shape[3] == 1) and (x.stride(2) == x.shape[3] or x.shape[2] == 1)
    return x if groups else x.contiguous()
