"""The state-space dual's backward pass in Triton: its launches.

The states before the chunks are computed again, which takes a third of the forward pass, and not kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.strided import strided
from ssmkernels.core.triton_support import on_device_of
from ssmkernels.ops.ssd.triton_arguments import Parts, skip, wide
from ssmkernels.ops.ssd.triton_launch import Chunks

HEADS = 4  # of a group, over which one program sums; more are parts


def backward(a: Any, _: Any, grads: Any) -> dict[str, Tensor | None]:
    with on_device_of(a.x):
        return Backward(a, grads, Chunks(a, None)).gradients()


class Backward:
    """One call's backward pass.

    Args:
        a: the call.
        grads: of y and the final state.
        chunks: of the forward pass.
    """

    def __init__(self, a: Any, grads: Any, chunks: Chunks):
        self.a, self.chunks = a, chunks
        self.parts = -(-self.chunks.dims.GROUP // HEADS)
        self.dz, self.dout = None, grads.y
        if a.z is not None:
            self.dz, self.dout = a.z.new_empty(a.z.shape), a.x.new_empty(a.x.shape)
            self.chunks.outputs(None, grads.y, self.dout, self.dz)
        self.dstates = torch.empty_like(self.chunks.states)
        self.chunks.chunk_states(self.dout, a.C, self.dstates, reverse=True)
        self.dinitial = None if a.initial_state is None else a.initial_state.new_empty(a.initial_state.shape)
        dfinal = wide(grads.final_state)
        self.between = self.chunks.walk(self.dstates, dfinal, self.dinitial, self.chunks.states, reverse=True)

    def gradients(self) -> dict[str, Tensor | None]:
        a = self.a
        dproducts, dexponent, ddelta = self._pairs()
        dx, dD = self._inputs()
        dB, to_state = self._map(a.x, a.B, a.C, dproducts, self.dstates, output=False)
        dC, from_state = self._map(self.dout, a.C, a.B, dproducts, self.chunks.states, output=True)
        found = {"x": dx, "B": dB, "C": dC, "D": dD, "z": self.dz, "initial_state": self.dinitial}
        assert self.between is not None
        return found | self.steps(Parts(dexponent, ddelta, from_state, to_state, self.between))

    def _pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        a, chunks = self.a, self.chunks
        g, Q = a.B.shape[2], chunks.Q
        dims, launched = chunks.settings("pairs_backward")
        dproducts = chunks.empty(g, self.parts, Q, Q)
        dexponent, ddelta = (torch.empty_like(chunks.steps.delta) for _ in range(2))
        given = {"x": strided(a.x), "dout": strided(self.dout), "steps": chunks.steps, "products": chunks.products}
        found = {"dproducts": dproducts, "dexponent": dexponent, "ddelta": ddelta}
        chunks.launch("pairs_backward", g * self.parts, dims=dims, **given, **found, HEADS=HEADS, **launched)
        return dproducts, dexponent, ddelta

    def _inputs(self) -> tuple[Tensor, Tensor | None]:
        a, chunks = self.a, self.chunks
        h, p = a.x.shape[2:]
        dx, dD = a.x.new_empty(a.x.shape), None if a.D is None else chunks.empty(h, p)
        dims, launched = chunks.settings("inputs_backward")
        chunks.launch(
            "inputs_backward",
            h * -(-p // dims.BLOCK_P),
            dims=dims,
            x=strided(a.x),
            dout=strided(self.dout),
            B=strided(a.B),
            D=skip(a.D, h, p, torch.float32),
            steps=chunks.steps,
            products=chunks.products,
            dstates=self.dstates,
            dx=dx,
            dD=dD,
            **launched,
        )
        if dD is not None:
            dD = dD.sum(0) if a.D.ndim == 2 else dD.sum((0, 2))
        return dx, dD

    def _map(
        self, x: Tensor, own: Tensor, other: Tensor, dproducts: Tensor, states: Tensor, output: bool
    ) -> tuple[Tensor, Tensor]:
        chunks, parts = self.chunks, self.parts
        dims, launched = chunks.settings("maps_backward")
        tiles = -(-own.shape[3] // dims.BLOCK_N)
        dots = chunks.empty(self.a.x.shape[2], tiles, chunks.Q)
        dmaps = own.new_empty((parts, *own.shape), dtype=torch.float32 if parts > 1 else own.dtype)
        chunks.launch(
            "maps_backward",
            own.shape[2] * parts * tiles,
            dims=dims,
            x=strided(x),
            own=strided(own),
            other=strided(other),
            steps=chunks.steps,
            dproducts=dproducts,
            states=states,
            dmaps=dmaps,
            dots=dots,
            part_size=own.numel(),
            OUTPUT=output,
            HEADS=HEADS,
            **launched,
        )
        return dmaps[0] if parts == 1 else dmaps.sum(0), dots

    def steps(self, parts: Parts) -> dict[str, Tensor | None]:
        """Gradients of what step sizes are made of: dt, A and the bias."""
        a, chunks = self.a, self.chunks
        h = a.x.shape[2]
        ddt, dA = a.dt.new_empty(a.dt.shape), None if a.A is None else chunks.empty(h)
        dbias = None if a.dt_bias is None else chunks.empty(h)
        given = {"dt": strided(a.dt), "A": wide(a.A), "bias": wide(a.dt_bias), "steps": chunks.steps}
        limits = {"least": float(a.dt_limit[0]), "most": float(a.dt_limit[1]), "SOFTPLUS": a.dt_softplus}
        made = {"parts": parts, "ddt": ddt, "dA": dA, "dbias": dbias, **parts.counts()}
        chunks.launch("steps_backward", h, **given, **made, **limits, num_warps=4)
        return {
            "dt": ddt,
            "A": None if dA is None else dA.sum(0),
            "dt_bias": None if dbias is None else dbias.sum(0),
        }
