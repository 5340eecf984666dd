"""Random draws of a mixer that its seed and its layer decide, kept as buffers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ssmzoo.mixer import Mixer

UNIT = 2**31  # what stands for 1 in uniform draws: integers, which no cast to half precision changes


class SeededDraws(Mixer):
    """Buffers of random numbers: saved with the weights, not trained, drawn anew by :meth:`redraw` alone."""

    seed: int
    layer: int = 0
    drawn: tuple[str, ...] = ()

    def set_draws(
        self,
        seed: int,
        *,
        normal: Mapping[str, tuple[int, ...]] | None = None,
        uniform: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """Makes the buffers of these names and shapes: normal ones, and int64 from 0 to :data:`UNIT` - 1."""
        self.seed = seed
        normal, uniform = normal or {}, uniform or {}
        for name, shape in normal.items():
            self.register_buffer(name, torch.empty(shape))
        for name, shape in uniform.items():
            self.register_buffer(name, torch.empty(shape, dtype=torch.int64))
        self.drawn = (*normal, *uniform)
        self.redraw()

    @torch.no_grad()
    def redraw(self) -> None:
        """Draws in place, on the CPU. States made before mean nothing after, if the seed or the layer has changed."""
        generator = torch.Generator().manual_seed((self.seed + 7919 * self.layer) % 2**63)
        for name in self.drawn:
            buffer = getattr(self, name)
            if buffer.is_meta:
                continue
            if buffer.is_floating_point():
                buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float32, device="cpu"))
            else:
                buffer.copy_(torch.randint(UNIT, buffer.shape, generator=generator, device="cpu"))

    def reset_parameters(self) -> None:
        """:meth:`redraw`, by the name that PyTorch's meta-device initialisers call after ``to_empty``."""
        self.redraw()

    def at_layer(self, layer: int, n_layers: int) -> None:
        self.layer = layer
        self.redraw()
