"""The launches of the state-space dual's Triton kernels that the forward and the backward pass share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.triton_support import kernels, next_power_of_2
from ssmkernels.ops.ssd.triton_arguments import (
    chunk_length,
    maps,
    options,
    places,
    products,
    sizes,
    skip,
    strides,
    wide,
)

BLOCK = 1024  # numbers of a state that a program carries along a sequence


class Chunks:
    """One call's chunks: their step sizes, sums of decays, products of maps, and the states before them.

    Attributes:
        count: how many there are; with packed sequences some are empty.
        delta, high, low: float32 (count h Q).
        products: float32 (count g Q Q).
        states: float32 (count h p n).
    """

    def __init__(self, a: Any, final: Tensor | None):
        self.a, self.Q, self.sizes = a, chunk_length(a), sizes(a)
        self.factors = self.precisions()
        self.count, self.places = places(a.x, a.cu_seqlens, self.Q)
        h, p = a.x.shape[2:]
        g, n = a.B.shape[2:]
        self.delta, self.high, self.low = (self.empty(h, self.Q) for _ in range(3))
        self.products, self.states = self.empty(g, self.Q, self.Q), self.empty(h, p, n)
        self.step_sizes()
        self._map_products()
        self.chunk_states(a.x, a.B, self.states, reverse=False)
        self.walk(self.states, wide(a.initial_state), final)

    def empty(self, *shape: int) -> Tensor:
        """float32 (count, …)."""
        return self.a.x.new_empty((self.count, *shape), dtype=torch.float32)

    def launch(self, kernel: str, programs: int, **fields: Any) -> None:
        """Runs a kernel of so many programs for each chunk."""
        if self.count * programs:
            getattr(kernels(__package__), kernel)[(self.count * programs,)](**fields)

    def precisions(self) -> dict[str, Any]:
        """The dtype of a product's factors, and how it is taken."""
        return products(self.a)

    def step_sizes(self) -> None:
        """Writes Δ and the sums of decays."""
        a, h = self.a, self.sizes["H"]
        block = min(8, next_power_of_2(h))
        self.launch(
            "step_sizes",
            -(-h // block),
            dt=a.dt,
            A=wide(a.A),
            bias=wide(a.dt_bias),
            delta=self.delta,
            high=self.high,
            low=self.low,
            **strides("dt", a.dt, ("batch", "time", "head")),
            **self.places,
            least=float(a.dt_limit[0]),
            most=float(a.dt_limit[1]),
            H=h,
            SOFTPLUS=a.dt_softplus,
            Q=self.Q,
            BLOCK_H=block,
            num_warps=2,
        )

    def _map_products(self) -> None:
        own = options("map_products", self.a, self.Q)
        del own["BLOCK_P"]
        self.launch(
            "map_products",
            self.a.B.shape[2],
            **maps("B", self.a.B),
            **maps("C", self.a.C),
            products=self.products,
            **self.places,
            G=self.a.B.shape[2],
            N=self.sizes["N"],
            PRECISION=self.factors["PRECISION"],
            **own,
        )

    def chunk_states(self, x: Tensor, map_: Tensor, states: Tensor, reverse: bool) -> None:
        """Writes what the chunks add to the states, or in reverse to their gradients."""
        own = options("chunk_states", self.a, self.Q)
        p_tiles, n_tiles = -(-self.sizes["P"] // own["BLOCK_P"]), -(-self.sizes["N"] // own["BLOCK_N"])
        self.launch(
            "chunk_states",
            self.sizes["H"] * p_tiles * n_tiles,
            x=x,
            **strides("x", x),
            **maps("maps", map_),
            delta=self.delta,
            high=self.high,
            low=self.low,
            states=states,
            **self.places,
            **self.sizes,
            REVERSE=reverse,
            **self.factors,
            **own,
        )

    def walk(
        self,
        states: Tensor,
        initial: Tensor | None,
        final: Tensor | None,
        other: Tensor | None = None,
        reverse: bool = False,
    ) -> Tensor | None:
        """Replaces additions by states, from ``initial`` to ``final``; returns the kernel's ``parts``."""
        a, size = self.a, self.sizes["P"] * self.sizes["N"]
        sequences = a.x.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
        block = min(BLOCK, next_power_of_2(size))
        blocks = -(-size // block)
        parts = None if other is None else states.new_zeros(self.count, self.sizes["H"], blocks)
        programs = sequences * self.sizes["H"] * blocks
        if programs:
            kernels(__package__).walk[(programs,)](
                states=states,
                high=self.high,
                initial=initial,
                final=final,
                other=other,
                parts=parts,
                cu_seqlens=self.places["cu_seqlens"],
                per_sequence=self.places["per_sequence"],
                H=self.sizes["H"],
                SIZE=size,
                REVERSE=reverse,
                Q=self.Q,
                BLOCK=block,
                num_warps=4,
            )
        return parts

    def outputs(self, y: Tensor | None, dy: Tensor | None, dout: Tensor | None, dz: Tensor | None) -> None:
        """Writes y, or from its gradient those of the gate and of y before the gate."""
        a = self.a
        own = options("outputs" if dy is None else "gates_backward", a, self.Q)
        self.launch(
            "outputs",
            self.sizes["H"] * -(-self.sizes["P"] // own["BLOCK_P"]),
            x=a.x,
            **strides("x", a.x),
            **maps("C", a.C),
            **skip(a.D, self.sizes["H"], self.sizes["P"], torch.float32),
            z=a.z,
            **strides("z", a.z),
            dy=dy,
            **strides("dy", dy),
            delta=self.delta,
            high=self.high,
            low=self.low,
            products=self.products,
            states=self.states,
            y=y,
            dout=dout,
            dz=dz,
            **self.places,
            **self.sizes,
            **self.factors,
            **own,
        )
