"""What the state-space dual's Triton kernels take of the arguments, where chunks lie, and launch settings."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels.core.strided import Strided
from ssmkernels.core.triton_support import all_registers, interpreting, next_power_of_2, owners


class Dims(NamedTuple):
    """One constant argument of a kernel, from which the functions that it calls take what they need.

    Attributes:
        H, GROUP: heads, and how many of them share a group's maps.
        P, N: inputs and states of a head.
        Q: slots of a chunk.
        BLOCK_P, BLOCK_N: inputs and states that a program takes at once.
        FACTOR, PRECISION: the dtype of a product's factors, one of Triton's, and how it is taken.
    """

    H: int
    GROUP: int
    P: int
    N: int
    Q: int
    BLOCK_P: int
    BLOCK_N: int
    FACTOR: Any
    PRECISION: str


class Steps(NamedTuple):
    """Step sizes, 0 beyond a chunk's end, and the sums of log2 of the decays in two parts: float32 (chunks h Q)."""

    delta: Tensor
    high: Tensor
    low: Tensor


class Parts(NamedTuple):
    """What the gradients of step sizes and of the decays' logarithms are made of, float32.

    Attributes:
        dexponent, ddelta: (chunks h Q) of the decays' logarithms, and of step sizes as weights of x, from the pairs of
            tokens of a chunk.
        from_state, to_state: (chunks h tiles Q) of the logarithms, through the outputs of the state before a chunk and
            through the state after it.
        between: (chunks h blocks) through the decay of the one state to the other.
    """

    dexponent: Tensor
    ddelta: Tensor
    from_state: Tensor
    to_state: Tensor
    between: Tensor

    def counts(self) -> dict[str, int]:
        """Tiles and blocks, by the kernels' names."""
        return {"N_TILES": self.from_state.shape[2], "BLOCKS": self.between.shape[2]}


def skip(D: Tensor | None, heads: int, p: int, sums: torch.dtype) -> Strided | None:
    """D in the dtype of sums, a number for each head and channel."""
    if D is None:
        return None
    D = (D if D.ndim == 2 else D[:, None]).to(sums).expand(heads, p)
    return Strided(D, 0, 0, *D.stride())


def wide(x: Tensor | None, sums: torch.dtype = torch.float32) -> Tensor | None:
    """Contiguous and in the dtype of sums."""
    return None if x is None else x.to(sums).contiguous()


def chunk_length(a: Any) -> int:
    """Tokens of a chunk: what was asked for, as far as registers and the least size of a product allow."""
    most = 16 if interpreting() else 64 if a.x.dtype.itemsize == 2 else 32
    return min(most, max(16, next_power_of_2(a.chunk_size or most)))


class Packing(NamedTuple):
    """The borders of a packed batch, and each chunk's sequence."""

    cu_seqlens: Tensor
    owners: Tensor


def places(x: Tensor, cu_seqlens: Tensor | None, Q: int) -> tuple[int, dict[str, Any]]:
    """How many chunks x (b l …) has, and what says where they lie. Nothing is read on the host."""
    length = x.shape[1]
    if cu_seqlens is None:
        return x.shape[0] * -(-length // Q), {"packing": None, "length": length}
    if cu_seqlens.shape[0] < 2:
        return 0, {"packing": None, "length": length}
    borders = cu_seqlens.contiguous()
    owner = owners(borders, length, Q)
    return len(owner), {"packing": Packing(borders, owner), "length": length}


def sizes(a: Any) -> dict[str, Any]:
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


def options(kernel: str, a: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Blocks of head dim and state, and launch settings: by dtype and sizes and never by length."""
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
    blocks = {"BLOCK_P": min(p, most_p), "BLOCK_N": min(n, most_n)}
    return blocks, {"num_warps": warps, "num_stages": 2, **all_registers()}


def _scattered(a: Any) -> bool:
    """Whether rows do not lie on multiples of 16: then addresses of single numbers take as many registers as sums."""
    if a.x.shape[3] % 16 or a.B.shape[3] % 16:
        return True
    tensors = [x for x in (a.x, a.z, a.B, a.C) if x is not None]
    return any(x.stride(3) != 1 or x.stride(1) % 16 or x.stride(2) % 16 for x in tensors)
