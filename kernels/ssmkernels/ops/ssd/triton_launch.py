"""The launches of the state-space dual's Triton kernels that the forward and the backward pass share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.strided import strided
from ssmkernels.core.triton_support import kernels, next_power_of_2
from ssmkernels.ops.ssd.triton_arguments import (
    Dims,
    Steps,
    chunk_length,
    options,
    places,
    products,
    sizes,
    skip,
    wide,
)

BLOCK = 1024  # numbers of a state that a program carries along a sequence


class Chunks:
    """One call's chunks: their step sizes, sums of decays, products of maps, and the states before them.

    Attributes:
        count: how many there are; with packed sequences some are empty.
        steps: float32 (count h Q).
        products: float32 (count g Q Q).
        states: float32 (count h p n).
    """

    def __init__(self, a: Any, final: Tensor | None):
        self.a, self.Q = a, chunk_length(a)
        blocks, _ = options("chunk_states", a)
        self.dims = Dims(**sizes(a), Q=self.Q, **blocks, **self.precisions())
        self.count, self.places = places(a.x, a.cu_seqlens, self.Q)
        h, p = a.x.shape[2:]
        g, n = a.B.shape[2:]
        self.steps = Steps(*(self.empty(h, self.Q) for _ in range(3)))
        self.products, self.states = self.empty(g, self.Q, self.Q), self.empty(h, p, n)
        self.step_sizes()
        self._map_products()
        self.chunk_states(a.x, a.B, self.states, reverse=False)
        self.walk(self.states, wide(a.initial_state), final)

    def empty(self, *shape: int) -> Tensor:
        """float32 (count, …)."""
        return self.a.x.new_empty((self.count, *shape), dtype=torch.float32)

    def settings(self, kernel: str) -> tuple[Dims, dict[str, Any]]:
        """What a kernel takes of the constants and of launch options."""
        blocks, launched = options(kernel, self.a)
        return self.dims._replace(**blocks), launched

    def launch(self, kernel: str, programs: int, **fields: Any) -> None:
        """Runs a kernel of so many programs for each chunk; with ``dims``, where it does not take those of all."""
        if self.count * programs:
            run = getattr(kernels(__package__), kernel)[(self.count * programs,)]
            run(**{"dims": self.dims, **self.places, **fields})

    def precisions(self) -> dict[str, Any]:
        """The dtype of a product's factors, and how it is taken."""
        return products(self.a)

    def step_sizes(self) -> None:
        """Writes Δ and the sums of decays."""
        a, h = self.a, self.dims.H
        block = min(8, next_power_of_2(h))
        self.launch(
            "step_sizes",
            -(-h // block),
            dt=strided(a.dt),
            A=wide(a.A),
            bias=wide(a.dt_bias),
            steps=self.steps,
            least=float(a.dt_limit[0]),
            most=float(a.dt_limit[1]),
            SOFTPLUS=a.dt_softplus,
            BLOCK_H=block,
            num_warps=2,
        )

    def _map_products(self) -> None:
        a = self.a
        dims, launched = self.settings("map_products")
        maps = {"B": strided(a.B), "C": strided(a.C), "products": self.products}
        self.launch("map_products", a.B.shape[2], dims=dims, **maps, **launched)

    def chunk_states(self, x: Tensor, map_: Tensor, states: Tensor, reverse: bool) -> None:
        """Writes what the chunks add to the states, or in reverse to their gradients."""
        dims, launched = self.settings("chunk_states")
        p_tiles, n_tiles = -(-dims.P // dims.BLOCK_P), -(-dims.N // dims.BLOCK_N)
        given = {"x": strided(x), "maps": strided(map_), "states": states, "steps": self.steps}
        self.launch("chunk_states", dims.H * p_tiles * n_tiles, dims=dims, **given, REVERSE=reverse, **launched)

    def walk(
        self,
        states: Tensor,
        initial: Tensor | None,
        final: Tensor | None,
        other: Tensor | None = None,
        reverse: bool = False,
    ) -> Tensor | None:
        """Replaces additions by states, from ``initial`` to ``final``; returns the kernel's ``parts``."""
        a, size = self.a, self.dims.P * self.dims.N
        sequences = a.x.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
        block = min(BLOCK, next_power_of_2(size))
        blocks = -(-size // block)
        parts = None if other is None else states.new_zeros(self.count, self.dims.H, blocks)
        programs = sequences * self.dims.H * blocks
        if programs:
            given = {"states": states, "high": self.steps.high, "initial": initial, "final": final, "other": other}
            constants = {"dims": self.dims, "REVERSE": reverse, "BLOCK": block, "num_warps": 4}
            kernels(__package__).walk[(programs,)](**given, parts=parts, **self.places, **constants)
        return parts

    def outputs(self, y: Tensor | None, dy: Tensor | None, dout: Tensor | None, dz: Tensor | None) -> None:
        """Writes y, or from its gradient those of the gate and of y before the gate."""
        a = self.a
        dims, launched = self.settings("outputs" if dy is None else "gates_backward")
        skipped = skip(a.D, dims.H, dims.P, torch.float32)
        given: dict[str, Any] = {
            "x": strided(a.x),
            "C": strided(a.C),
            "D": skipped,
            "z": strided(a.z),
            "dy": strided(dy),
        }
        given |= {"steps": self.steps, "products": self.products, "states": self.states, "y": y, "dout": dout, "dz": dz}
        self.launch("outputs", dims.H * -(-dims.P // dims.BLOCK_P), dims=dims, **given, **launched)
