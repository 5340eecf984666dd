"""Linear recurrences whose key channels have a decay each, in chunks, in Triton: the launches of the kernels.

The forward and the backward pass of linear attention are here. The kernels between them serve other ops as well: each
method takes the queries, keys and values that it is for.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.triton_support import all_registers, interpreting, kernels, next_power_of_2
from ssmkernels.ops.linear_attention.gradients import added
from ssmkernels.ops.linear_attention.reference import scale_of
from ssmkernels.ops.ssd.triton_arguments import AXES, places, strides, wide

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
        self.count, found = places(a.q, a.cu_seqlens, Q)
        self.spans = {name: found[name] for name in ("cu_seqlens", "length", "per_sequence")}
        self.owners = {"owners": found["owners"]}
        self.sequences = a.q.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
        (self.h, self.v), (g, self.k) = a.v.shape[2:], a.k.shape[2:]
        self.sizes = {"H": self.h, "GROUP": self.h // g, "K": self.k, "V": self.v, "Q": Q}
        language = importlib.import_module("triton.language")
        self.factors = {"FACTOR": getattr(language, factor), "PRECISION": "tf32" if half else "ieee"}
        g = a.log_decay
        if g is not None:  # channels that share one read it at a stride of 0
            g = (g if g.ndim == 4 else g.expand(a.v.shape[:3])[..., None]).expand(*a.v.shape[:3], self.k)
        self.decays = {"decay": g, **strides("decay", g)}

    def empty(self, *shape: int) -> Tensor:
        """float32 (count h …)."""
        return self.a.q.new_empty((self.count, self.h, *shape), dtype=torch.float32)

    def blocks(self, k: int | None = None) -> tuple[dict[str, int], int, int]:
        """Of key channels, at most k, and of value channels, and how many there are of each."""
        own = [min(most, max(16, next_power_of_2(n))) for most, n in ((k or self.block, self.k), (self.block, self.v))]
        return {"BLOCK_K": own[0], "BLOCK_V": own[1]}, -(-self.k // own[0]), -(-self.v // own[1])

    def run(self, kernel: str, programs: int, warps: int, fields: dict[str, Any], package: str = PACKAGE) -> None:
        """A kernel of so many programs, with what all of them take."""
        options = {"num_warps": 1 if interpreting() else warps, "num_stages": 1, **all_registers(32 * warps)}
        if programs:
            getattr(kernels(package), kernel)[(programs,)](**fields, **self.spans, **self.factors, **options)

    def parts(self, kernel: str, programs: int, warps: int, bonus: Tensor | None, fields: dict[str, Any]) -> None:
        """A kernel of so many programs for each part of a chunk."""
        sizes = {name: self.sizes[name] for name in ("H", "GROUP", "K", "Q")}
        own = {"bonus": None if bonus is None else bonus.contiguous(), "C": PART, **self.owners, **self.decays, **sizes}
        self.run(kernel, self.count * self.h * (self.Q // PART) * programs, warps, own | fields)

    def pairs(self, q: Tensor, k: Tensor, scale: float, shift: bool, bonus: Tensor | None = None) -> Tensor:
        """P (count h Q Q)."""
        P, (blocks, _, _) = self.empty(self.Q, self.Q), self.blocks()
        own: dict[str, Any] = {**together(q=q, k=k), "BLOCK_K": blocks["BLOCK_K"], "scale": scale, "SHIFT": int(shift)}
        self.parts("pairs", 1, 4, bonus, own | {"P": P})
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
        states, (blocks, k_tiles, v_tiles) = self.empty(self.k, self.v), self.blocks()
        own: dict[str, Any] = {
            **together(x=x, y=y),
            **self.decays,
            **self.sizes,
            **blocks,
            "SHIFT": int(shift),
            "REVERSE": reverse,
        }
        own |= {"initial": wide(initial), "final": final, "states": states, "scale": scale}
        self.run("walk", self.sequences * self.h * k_tiles * v_tiles, 8, own)
        return states

    def outputs(
        self, x: Tensor, y: Tensor, P: Tensor, states: Tensor, to: Tensor, scale: float, shift: bool, reverse: bool
    ) -> None:
        """Fills ``to`` with the output, or with the gradient of the values."""
        blocks, _, tiles = self.blocks()
        own: dict[str, Any] = {
            **together(x=x, y=y),
            **self.decays,
            **self.sizes,
            **blocks,
            "SHIFT": int(shift),
            "REVERSE": reverse,
        }
        own |= {"P": P, "states": states, "to": to, "scale": scale}
        self.run("outputs", self.count * self.h * tiles, 8, own | self.owners)

    def weights(self, v: Tensor, do: Tensor, scale: float) -> Tensor:
        """The gradient of P, with the scale of the queries."""
        dP, (blocks, _, _) = self.empty(self.Q, self.Q), self.blocks()
        sizes = {name: self.sizes[name] for name in ("H", "V", "Q")}
        own: dict[str, Any] = {
            **together(v=v, do=do),
            **sizes,
            **self.owners,
            "scale": scale,
            "BLOCK_V": blocks["BLOCK_V"],
        }
        self.run("weights_backward", self.count * self.h, 4, own | {"dP": dP})
        return dP


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
        blocks, tiles, _ = chunks.blocks(k=32)
        own: dict[str, Any] = {
            **together(q=q, k=k, v=v, do=do),
            **chunks.decays,
            **chunks.owners,
            **chunks.sizes,
            **blocks,
        }
        own |= {"states": states, "dstates": dstates, "dq": dq, "dk": dk, "ddecay": self.decay}
        own |= {"scale": scale, "SHIFT": int(shift), "AROUND": around}
        chunks.run("states_backward", chunks.count * chunks.h * tiles, 8, own)
        return dq, dk

    def of_pairs(
        self, q: Tensor, k: Tensor, dP: Tensor, dq: Tensor, dk: Tensor, shift: bool, bonus: Tensor | None = None
    ) -> Tensor | None:
        """Adds what pairs of tokens within a chunk give; returns the gradient of the bonus."""
        chunks = self.chunks
        dbonus = None if bonus is None else chunks.empty(chunks.Q // PART, chunks.k)
        blocks, tiles, _ = chunks.blocks(k=32)
        own: dict[str, Any] = {
            **together(q=q, k=k),
            "dP": dP,
            "dq": dq,
            "dk": dk,
            "ddecay": self.decay,
            "dbonus": dbonus,
        }
        own |= {"BLOCK_K": blocks["BLOCK_K"], "SHIFT": int(shift)}
        chunks.parts("keys_backward", tiles, 8, bonus, own)
        return None if dbonus is None else dbonus.sum((0, 2))


def together(**tensors: Tensor) -> dict[str, Any]:
    """Tensors (b l h …) and their strides, by the kernels' names."""
    found: dict[str, Any] = dict(tensors)
    for name, x in tensors.items():
        found |= strides(name, x, AXES)
    return found


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
