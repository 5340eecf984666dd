"""Linear recurrences whose key channels have a decay each, in chunks, in Triton: the launches of the kernels.

The forward and the backward pass of linear attention are here. The kernels between them serve other ops as well: each
method takes the queries, keys and values that it is for.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.strided import strided
from ssmkernels.core.triton_support import all_registers, interpreting, kernels, next_power_of_2
from ssmkernels.ops.delta_rule.triton_dims import Dims
from ssmkernels.ops.linear_attention.gradients import added
from ssmkernels.ops.linear_attention.reference import scale_of
from ssmkernels.ops.ssd.triton_arguments import places, wide

PACKAGE = "ssmkernels.ops.linear_attention"
PART = 16  # tokens between which decays are multiplied on


class Chunks:
    """One call's chunks, and the kernels that run for each of them.

    Args:
        a: the call, with ``q``, ``k``, ``v``, ``log_decay`` and ``cu_seqlens``.
        Q: tokens of a chunk.
        factor: the dtype of a product's factors, one of Triton's.

    Attributes:
        count: how many chunks there are; with packed sequences some are empty.
    """

    def __init__(self, a: Any, Q: int, factor: str):
        self.a, self.Q = a, Q
        half = a.q.dtype.itemsize == 2
        self.block = 64 if half and not interpreting() else 32  # channels of a tile
        self.count, self.places = places(a.q, a.cu_seqlens, Q)
        self.sequences = a.q.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
        (self.h, self.v), (g, self.k) = a.v.shape[2:], a.k.shape[2:]
        block_k, block_v = (min(self.block, max(16, next_power_of_2(n))) for n in (self.k, self.v))
        products = getattr(importlib.import_module("triton.language"), factor), "tf32" if half else "ieee"
        self.dims = Dims(self.h, self.h // g, self.k, self.v, Q, block_k, block_v, *products)
        g = a.log_decay
        if g is not None:  # channels that share one read it at a stride of 0
            g = (g if g.ndim == 4 else g.expand(a.v.shape[:3])[..., None]).expand(*a.v.shape[:3], self.k)
        self.decay = strided(g)

    def empty(self, *shape: int) -> Tensor:
        """float32 (count h …)."""
        return self.a.q.new_empty((self.count, self.h, *shape), dtype=torch.float32)

    def narrow(self) -> Dims:
        """The constants of the kernels that have more beside a tile of key channels in registers."""
        return self.dims._replace(BLOCK_K=min(32, self.dims.BLOCK_K))

    def run(self, kernel: str, programs: int, warps: int, dims: Dims, package: str = PACKAGE, **fields: Any) -> None:
        """A kernel of so many programs, with what all of them take."""
        options = {"num_warps": 1 if interpreting() else warps, "num_stages": 1, **all_registers(32 * warps)}
        if programs:
            getattr(kernels(package), kernel)[(programs,)](**fields, **self.places, dims=dims, **options)

    def parts(self, kernel: str, programs: int, warps: int, dims: Dims, bonus: Tensor | None, **fields: Any) -> None:
        """A kernel of so many programs for each part of a chunk."""
        programs *= self.count * self.h * (self.Q // PART)
        bonus = None if bonus is None else bonus.contiguous()
        self.run(kernel, programs, warps, dims, bonus=bonus, C=PART, decay=self.decay, **fields)

    def pairs(self, q: Tensor, k: Tensor, scale: float, shift: bool, bonus: Tensor | None = None) -> Tensor:
        """P (count h Q Q)."""
        P = self.empty(self.Q, self.Q)
        self.parts("pairs", 1, 4, self.dims, bonus, **together(q=q, k=k), scale=scale, SHIFT=int(shift), P=P)
        return P

    def walk(
        self,
        x: Tensor,
        y: Tensor,
        initial: Tensor | None,
        final: Tensor | None,
        scale: float,
        shift: bool,
        reverse: bool,
    ) -> Tensor:
        """The states before the chunks, (count h k v), or the gradients of those after them; fills ``final``."""
        states = self.empty(self.k, self.v)
        programs = self.sequences * self.h * key_tiles(self.dims) * value_tiles(self.dims)
        own = {**together(x=x, y=y), "decay": self.decay, "initial": wide(initial), "final": final, "states": states}
        self.run("walk", programs, 8, self.dims, **own, scale=scale, SHIFT=int(shift), REVERSE=reverse)
        return states

    def outputs(
        self, x: Tensor, y: Tensor, P: Tensor, states: Tensor, to: Tensor, scale: float, shift: bool, reverse: bool
    ) -> None:
        """Fills ``to`` with the output, or with the gradient of the values."""
        programs = self.count * self.h * value_tiles(self.dims)
        own = {**together(x=x, y=y), "decay": self.decay, "P": P, "states": states, "to": to}
        self.run("outputs", programs, 8, self.dims, **own, scale=scale, SHIFT=int(shift), REVERSE=reverse)

    def weights(self, v: Tensor, do: Tensor, scale: float) -> Tensor:
        """The gradient of P, with the scale of the queries."""
        dP = self.empty(self.Q, self.Q)
        self.run("weights_backward", self.count * self.h, 4, self.dims, **together(v=v, do=do), scale=scale, dP=dP)
        return dP


def key_tiles(dims: Dims) -> int:
    return -(-dims.K // dims.BLOCK_K)


def value_tiles(dims: Dims) -> int:
    return -(-dims.V // dims.BLOCK_V)


class Gradients:
    """Those of keys, queries and log decays, float32 (b l h k), to which each call adds what it finds.

    Attributes:
        decay: of the log decays, as if each channel had its own; None without decays.
    """

    def __init__(self, chunks: Chunks):
        self.chunks = chunks
        self.decay = None if chunks.a.log_decay is None else self.empty().zero_()

    def empty(self) -> Tensor:
        chunks = self.chunks
        return chunks.a.q.new_empty((*chunks.a.v.shape[:3], chunks.k), dtype=torch.float32)

    def of_states(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        do: Tensor,
        states: Tensor,
        dstates: Tensor,
        scale: float,
        shift: bool,
        around: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Begins the gradients of q and k by what states carry; ``around``: and the decays' by what passes a chunk."""
        chunks, dq, dk = self.chunks, self.empty(), self.empty()
        dims = chunks.narrow()
        own = {**together(q=q, k=k, v=v, do=do), "decay": chunks.decay, "states": states, "dstates": dstates}
        own |= {"dq": dq, "dk": dk, "ddecay": self.decay, "scale": scale, "SHIFT": int(shift), "AROUND": around}
        chunks.run("states_backward", chunks.count * chunks.h * key_tiles(dims), 8, dims, **own)
        return dq, dk

    def of_pairs(
        self, q: Tensor, k: Tensor, dP: Tensor, dq: Tensor, dk: Tensor, shift: bool, bonus: Tensor | None = None
    ) -> Tensor | None:
        """Adds what pairs of tokens within a chunk give; returns the gradient of the bonus."""
        chunks, dims = self.chunks, self.chunks.narrow()
        dbonus = None if bonus is None else chunks.empty(chunks.Q // PART, chunks.k)
        own = {**together(q=q, k=k), "dP": dP, "dq": dq, "dk": dk, "ddecay": self.decay, "dbonus": dbonus}
        chunks.parts("keys_backward", key_tiles(dims), 8, dims, bonus, **own, SHIFT=int(shift))
        return None if dbonus is None else dbonus.sum((0, 2))


def together(**tensors: Tensor) -> dict[str, Any]:
    """Tensors (b l h …) as kernels take them."""
    return {name: strided(x) for name, x in tensors.items()}


def _chunks(a: Any) -> Chunks:
    tokens = 64 if a.q.dtype.itemsize == 2 and not interpreting() else 32
    return Chunks(a, tokens, "bfloat16" if a.q.dtype == torch.bfloat16 else "float32")


def forward(a: Any, o: Tensor, final_state: Tensor) -> None:
    chunks, scale, shift = _chunks(a), float(scale_of(a.scale, a.k)), a.bonus is not None
    states = chunks.walk(a.k, a.v, a.initial_state, final_state, scale, shift, reverse=False)
    P = chunks.pairs(a.q, a.k, scale, shift, a.bonus)
    chunks.outputs(a.q, a.v, P, states, o, scale, shift, reverse=False)


def backward(a: Any, grads: Any) -> dict[str, Tensor | None]:
    """States are computed again, and not kept."""
    chunks, scale, shift = _chunks(a), float(scale_of(a.scale, a.k)), a.bonus is not None
    do, dv = grads.o, a.v.new_empty(a.v.shape)
    d_initial = None if a.initial_state is None else a.initial_state.new_empty(a.initial_state.shape)
    states = chunks.walk(a.k, a.v, a.initial_state, None, scale, shift, reverse=False)
    dstates = chunks.walk(a.q, do, grads.final_state, d_initial, scale, shift, reverse=True)
    P = chunks.pairs(a.q, a.k, scale, shift, a.bonus)
    chunks.outputs(a.k, do, P, dstates, dv, scale, shift, reverse=True)
    found = Gradients(chunks)
    dq, dk = found.of_states(a.q, a.k, a.v, do, states, dstates, scale, shift)
    d_bonus = found.of_pairs(a.q, a.k, chunks.weights(a.v, do, scale), dq, dk, shift, a.bonus)
    groups = (a.k.shape[2], -1)
    dq, dk = (t if groups[0] == chunks.h else added(t.unflatten(2, groups), 3) for t in (dq, dk))
    d_decay = found.decay
    if d_decay is not None and a.log_decay.ndim < 4:
        d_decay = d_decay.sum(-1)
        d_decay = d_decay.sum((0, 1)) if a.log_decay.ndim == 1 else d_decay
    return {"q": dq, "k": dk, "v": dv, "log_decay": d_decay, "bonus": d_bonus, "initial_state": d_initial}
