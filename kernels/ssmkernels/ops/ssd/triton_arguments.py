"""What the state-space dual's Triton kernels take of the arguments, where chunks lie, and launch settings."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.triton_support import all_registers, interpreting, next_power_of_2, owners

AXES = ("batch", "time", "head", "step")


def strides(name: str, x: Tensor | None, axes: tuple[str, ...] = AXES) -> dict[str, int]:
    """In elements, by the kernels' names; 0 where there is no tensor."""
    values = [0] * len(axes) if x is None else x.stride()
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, values, strict=True)}


def maps(name: str, x: Tensor) -> dict[str, Any]:
    """B or C and its strides."""
    return {name: x, **strides(name, x, ("batch", "time", "group", "step"))}


def skip(D: Tensor | None, heads: int, p: int, sums: torch.dtype) -> dict[str, Any]:
    """D in the dtype of sums, a number for each head and channel."""
    if D is not None:
        D = (D if D.ndim == 2 else D[:, None]).to(sums).expand(heads, p)
    return {"D": D, **strides("D", D, ("head", "step"))}


def wide(x: Tensor | None, sums: torch.dtype = torch.float32) -> Tensor | None:
    """Contiguous and in the dtype of sums."""
    return None if x is None else x.to(sums).contiguous()


def chunk_length(a: Any) -> int:
    """Tokens of a chunk: what was asked for, as far as registers and the least size of a product allow."""
    most = 16 if interpreting() else 64 if a.x.dtype.itemsize == 2 else 32
    return min(most, max(16, next_power_of_2(a.chunk_size or most)))


def places(x: Tensor, cu_seqlens: Tensor | None, Q: int) -> tuple[int, dict[str, Any]]:
    """How many chunks x (b l …) has, and what says where they lie. Nothing is read on the host."""
    length, per_sequence = x.shape[1], -(-x.shape[1] // Q)
    found = {"cu_seqlens": None, "owners": None, "length": length, "per_sequence": per_sequence}
    if cu_seqlens is None:
        return x.shape[0] * per_sequence, found
    if cu_seqlens.shape[0] < 2:
        return 0, found
    borders = cu_seqlens.contiguous()
    owner = owners(borders, length, Q)
    return len(owner), {**found, "cu_seqlens": borders, "owners": owner}


def sizes(a: Any) -> dict[str, int]:
    """What the compiler may know."""
    (heads, p), (groups, n) = a.x.shape[-2:], a.B.shape[-2:]
    return {"H": heads, "GROUP": heads // groups, "P": p, "N": n}


def products(a: Any) -> dict[str, Any]:
    """The dtype of a product's factors, of which one may have been computed, and how it is taken.

    float16 holds no state as large as a sum may be: TF32 has its digits and the range of float32.
    """
    dtype = a.x.dtype
    language = importlib.import_module("triton.language")
    factor = language.bfloat16 if dtype == torch.bfloat16 else language.float32
    return {"FACTOR": factor, "PRECISION": "ieee" if dtype == torch.float32 else "tf32"}


def options(kernel: str, a: Any, Q: int) -> dict[str, Any]:
    """Launch settings: blocks of head dim and state, warps, by dtype and sizes and never by length."""
    p, n = (max(16, next_power_of_2(size)) for size in (a.x.shape[3], a.B.shape[3]))
    if interpreting():
        most_p, most_n, warps = 16, 32, 1
    elif a.x.dtype == torch.float32:
        most_p, most_n, warps = 32, 32, 8 if kernel == "pairs_backward" else 4
        if kernel in ("outputs", "inputs_backward", "maps_backward") and _scattered(a):
            warps *= 2
    else:
        most_p = 32 if kernel == "gates_backward" else 64
        most_n, warps = 64, 4 if kernel in ("map_products", "chunk_states") else 8
        if kernel in ("outputs", "gates_backward", "inputs_backward") and _scattered(a):
            most_p //= 2
    found = {"Q": Q, "BLOCK_P": min(p, most_p), "BLOCK_N": min(n, most_n)}
    return {**found, "num_warps": warps, "num_stages": 2, **all_registers()}


def _scattered(a: Any) -> bool:
    """Whether rows do not lie on multiples of 16: then addresses of single numbers take as many registers as sums."""
    if a.x.shape[3] % 16 or a.B.shape[3] % 16:
        return True
    tensors = [x for x in (a.x, a.z, a.B, a.C) if x is not None]
    return any(x.stride(3) != 1 or x.stride(1) % 16 or x.stride(2) % 16 for x in tensors)
