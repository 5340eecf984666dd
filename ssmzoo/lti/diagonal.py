"""A gated convolution whose kernel is the response of a diagonal system, with the system's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ssmkernels import fft_conv
from ssmkernels.core.autocast import autocasts
from ssmkernels.core.crossing import crossing
from ssmkernels.core.packing import longest
from ssmzoo.lti.recurrence import Diagonal, DiagonalStep, run_chunk


class DiagonalFilter(NamedTuple):
    """A system for each of d channels, h_t = Ā h_{t-1} + B̄ u_t, y_t = 2 Re(C h_t) + D u_t; complex, n states.

    Attributes:
        kernel: length → the response to an impulse without the skip, ``(d, length)``.
        discrete: Ā in float64 and B̄.
        stepper: the same for one token.
        C: ``(d n)``.
        D: ``(d)``.
    """

    kernel: Callable[[int], Tensor]
    discrete: Callable[[], Diagonal]
    stepper: Callable[[], DiagonalStep]
    C: Tensor
    D: Tensor

    def __call__(
        self, u: Tensor, gate: Tensor, h: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """gate ∘ y and the state after it.

        Args:
            u: ``(b l d)``.
            gate: likewise.
            h: the state before, ``(s d n)``; None to begin, and to get none.
            cu_seqlens: borders of packed sequences.
        """
        if h is None:
            kernel = self.kernel(longest(u.shape[1], cu_seqlens))
            return fft_conv(u, kernel, self.D, gate=gate, cu_seqlens=cu_seqlens), None
        kind = u.device.type
        if autocasts(kind):
            with torch.autocast(kind, enabled=False):  # states keep their precision
                return self._go_on(u, gate, h, cu_seqlens)
        return self._go_on(u, gate, h, cu_seqlens)

    def _go_on(self, u: Tensor, gate: Tensor, h: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        wide = h.real.dtype
        if u.shape[1] == 1 and cu_seqlens is None:
            x = u[:, 0].to(wide)
            h = self.stepper().step(h, x)
            y = (2 * (self.C * h).sum(-1).real + self.D * x)[:, None]
        else:
            kernel = self.kernel(longest(u.shape[1], cu_seqlens))
            with crossing(None):  # what comes from elsewhere is in the state
                own = fft_conv(u, kernel, self.D, cu_seqlens=cu_seqlens)
            inherited, h = run_chunk(self.discrete(), self.C[:, None], u.to(wide), h, cu_seqlens)
            y = own + inherited[:, :, 0]
        return (y * gate).to(u.dtype), h
