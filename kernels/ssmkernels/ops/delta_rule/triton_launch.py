"""The launches of the delta rule's Triton kernels."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.strided import strided
from ssmkernels.core.triton_support import all_registers, interpreting, kernels, next_power_of_2
from ssmkernels.ops.delta_rule.reference import scale_of
from ssmkernels.ops.delta_rule.triton_dims import Between, Dims
from ssmkernels.ops.ssd.triton_arguments import places, wide

NUMBERS = 2048  # of a state that a program has in registers, once or twice
WIDE = 16 if interpreting() else 128  # keys of a state that fits into registers
PIECE = 16 if interpreting() else 64  # keys that are in registers at once of one that does not


def rows(x: Tensor) -> Tensor:
    """x with a contiguous last axis: addresses of single numbers would take as many registers as the sums."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Chunks:
    """One call's chunks.

    Attributes:
        count: how many there are; with packed sequences some are empty.
        sequences: how many sequences.
        between: what passes between the tokens of each.
    """

    def __init__(self, a: Any):
        a = a._replace(**{name: rows(getattr(a, name)) for name in "qkv"})
        k = a.k.shape[3]
        narrow = k <= WIDE and k % 16 == 0 and a.q.dtype != torch.float32
        self.a, self.Q = a, 32 if narrow and not interpreting() else 16
        self.count, self.places = places(a.q, a.cu_seqlens, self.Q)
        self.sequences = a.q.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
        (h, v), (g, k) = a.v.shape[2:], a.k.shape[2:]
        self.h, self.k, self.v, self.channels = h, k, v, a.log_decay is not None and a.log_decay.ndim == 4
        self.registers = k <= WIDE
        self.scale = scale_of(a.scale, k)
        products = importlib.import_module("triton.language").float32, "ieee" if a.q.dtype == torch.float32 else "tf32"
        self.dims = Dims(h, h // g, k, v, self.Q, min(self._block(k), 32), self._block(v), *products)
        self.between = Between(*(self.empty(self.Q, size) for size in (k, k, self.Q, self.Q)))
        self.run("prepare", 1, self.dims, **self.keys(), decay=self.decay(), between=self.between)

    def empty(self, *shape: int) -> Tensor:
        """float32 (count h …)."""
        return self.a.q.new_empty((self.count, self.h, *shape), dtype=torch.float32)

    def run(self, kernel: str, programs: int, dims: Dims, **fields: Any) -> None:
        """A kernel of so many programs for each head of each chunk."""
        self._launch(kernel, self.count * self.h * programs, 1 if interpreting() else 4, dims, fields)

    def carry(self, kernel: str, **fields: Any) -> None:
        """A kernel that goes through each sequence, for some columns of each head's state."""
        rows = self._block(self.k) if self.registers else PIECE
        block = max(16, min(self._block(self.v), NUMBERS // self._block(self.k)))
        dims = self.dims._replace(BLOCK_K=rows, BLOCK_V=block)
        fields |= self.keys() | {"between": self.between}
        self._launch(kernel, self.sequences * self.h * -(-self.v // block), 4 if interpreting() else 8, dims, fields)

    def _launch(self, kernel: str, programs: int, warps: int, dims: Dims, fields: dict[str, Any]) -> None:
        options = {"num_warps": warps, "num_stages": 1, **all_registers(32 * warps)}
        if programs:
            run = getattr(kernels(__package__), kernel)[(programs,)]
            run(**fields, **self.places, scale=self.scale, dims=dims, **options)

    def walk(self, final: Tensor | None, o: Tensor | None, errors: Tensor | None, states: Tensor | None) -> None:
        a = self.a
        outputs = {"final": final, "o": o, "errors": errors, "states": states}
        self.carry("walk", v=strided(a.v), initial=wide(a.initial_state), **outputs)

    def keys(self) -> dict[str, Any]:
        a = self.a
        return {"q": strided(a.q), "k": strided(a.k), "beta": strided(a.beta)}

    def decay(self) -> Any:
        return strided(self.a.log_decay)

    @staticmethod
    def _block(size: int) -> int:
        return max(16, next_power_of_2(size))


class Backward:
    """The backward pass: errors and states are computed again, not kept."""

    def __init__(self, a: Any, grads: Any):
        self.chunks = chunks = Chunks(a)
        self.a, Q, k, v = chunks.a, chunks.Q, chunks.k, chunks.v
        self.do = strided(rows(grads.o))
        self.errors, self.X = chunks.empty(Q, v), chunks.empty(Q, v)
        self.states = chunks.empty(k, v)
        initial, count = chunks.sequences * chunks.h, chunks.count * chunks.h
        self.dinitial, self.dstates = a.q.new_empty((initial + count, k, v), dtype=torch.float32).split(
            (initial, count)
        )
        self.dpairs, self.dkeys = chunks.empty(Q, Q), chunks.empty(Q, Q)
        chunks.walk(None, None, self.errors, self.states)

    def gradients(self, dfinal: Tensor | None) -> dict[str, Tensor | None]:
        a, chunks = self.a, self.chunks
        empty = functools.partial(a.q.new_empty, dtype=torch.float32)
        dv, dbeta = a.v.new_empty(a.v.shape), empty(a.beta.shape)
        chunks.carry(
            "walk_backward",
            do=self.do,
            X=self.X,
            dv=dv,
            dstates=self.dstates,
            dfinal=wide(dfinal),
            dinitial=self.dinitial,
        )
        made = {"do": self.do, "errors": self.errors, "X": self.X, "dpairs": self.dpairs, "dkeys": self.dkeys}
        dims = chunks.dims._replace(BLOCK_V=16 if interpreting() else 32)
        chunks.run("weights_backward", 1, dims, beta=strided(a.beta), **made, dbeta=dbeta)
        dq, dk, dg = self._keys(made)
        state = a.initial_state
        dinitial = None if state is None else self.dinitial.view(state.shape).clone()  # not a part of something large
        return {"q": dq, "k": dk, "v": dv, "beta": dbeta, "log_decay": dg, "initial_state": dinitial}

    def _keys(self, made: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        a, chunks = self.a, self.chunks
        b, l, h, _ = a.v.shape
        block = 16
        tiles = -(-chunks.k // block)
        shape = (b, l, h, chunks.k if chunks.channels else tiles)
        empty = functools.partial(a.q.new_empty, dtype=torch.float32)
        dq, dk = empty((b, l, h, chunks.k)), empty((b, l, h, chunks.k))
        dg, later = (None, None) if a.log_decay is None else (empty(shape), empty(shape))
        dims = chunks.dims._replace(BLOCK_K=block, BLOCK_V=16)
        given = {**chunks.keys(), **made, "decay": chunks.decay(), "between": chunks.between}
        given |= {"states": self.states, "dstates": self.dstates, "CHANNELS": chunks.channels}
        chunks.run("keys_backward", tiles, dims, **given, dq=dq, dk=dk, ddecay=dg, dlater=later)
        groups = (a.k.shape[2], -1)
        dq, dk = (t.unflatten(2, groups).sum(3) if groups[0] < h else t for t in (dq, dk))
        if dg is not None and later is not None:
            dg[:, 1:] += later[:, :-1]
            dg = dg if chunks.channels else dg.sum(-1)
        return dq, dk, dg
