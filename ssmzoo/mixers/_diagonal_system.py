"""What LRU and S5 share: a linear system with a diagonal complex matrix, and the nonlinearity after it.

Glossary: b batch, l length, d: d_model, n: states, one for each eigenvalue. For u (b l d)::

    h_t = Λ̄ h_{t-1} + B̄ u_t                (b l n), complex; one Λ̄ (n) for all times, B̄ (n d)
    y_t = k Re(C h_t) + D u_t              (b l d), C (d n), D (d); k = 2 where a state stands for a conjugate pair
    out = activation(y)                    (b l d)

A bidirectional layer adds k Re(C₂ h'_t), where h' runs from the end, with the same Λ̄ and B̄.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels import linear_recurrence
from ssmkernels.core.validate import precision
from ssmzoo.bidirectional import bidirectional as both_ways
from ssmzoo.linear import Linear, linear
from ssmzoo.mixer import Mixer
from ssmzoo.state import State

Activation = Literal["full_glu", "half_glu1", "half_glu2", "gelu", "none"]


@dataclasses.dataclass
class DiagonalState(State):
    """The last h of each sequence."""

    h: Tensor  # (s, n), complex64 (complex128)


class DiagonalSystem(Mixer):
    """A mixer around a diagonal linear system, whose weights a subclass holds.

    Args:
        d_model: width of input and output.
        n: states.
        activation: after the system: ``"gelu"``; ``"full_glu"``, out1(gelu(y)) σ(out2(gelu(y))); ``"half_glu1"``,
            gelu(y) σ(out2(gelu(y))); ``"half_glu2"``, y σ(out2(gelu(y))); or ``"none"``.
        dropout: after each GELU and at the end.
        bidirectional: adds outputs of the states from the end; then it is not causal and has no state.
    """

    crosses_in_ops = True
    state_class = DiagonalState
    residual_projections = ()
    twice = False  # whether a state stands for a pair of conjugate ones

    def __init__(self, d_model: int, n: int, activation: Activation, dropout: float, bidirectional: bool):
        super().__init__(d_model)
        self.n, self.activation = n, activation
        self.look_ahead(bidirectional)
        self.check_at_least(0, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.out1 = Linear(d_model, d_model) if activation == "full_glu" else None
        self.out2 = Linear(d_model, d_model) if "glu" in activation else None

    def system(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Λ̄ (n), B̄ (n d), and C (d n) for each direction, all complex, in float32 (float64)."""
        raise NotImplementedError

    @property
    def skip(self) -> Tensor:
        """D, ``(d)``."""
        raise NotImplementedError

    def initial_state(self, batch_size: int, max_length: int | None = None) -> DiagonalState:
        self.check_has_state()
        like = self.like(wide=True)
        return DiagonalState(like.new_zeros(batch_size, self.n, dtype=like.dtype.to_complex()))

    def mixing_flops(self, context: int) -> float:
        """Four for each complex weight of B and, in each direction, C; eight for each state of the recurrence."""
        ways = 2 if self.bidirectional else 1
        return self.n * (4 * self.d_model * (1 + ways) + 8 * ways)

    @torch.no_grad()
    def matrices(self) -> list[Tensor]:
        _, B, ways = self.system()
        dtype = self.like().dtype
        return [_input_map(B).to(dtype), *(_output_map(C).to(dtype) for C in ways)]

    def mix(
        self, x: Tensor, state: DiagonalState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, DiagonalState | None]:
        decay, B, ways = self.system()
        wide = decay.real.dtype
        inputs = linear(x, _input_map(B).to(x.dtype)).to(wide)
        inputs = torch.view_as_complex(inputs.unflatten(-1, (self.n, 2)))  # (b l n)

        def outputs(h: Tensor, C: Tensor) -> Tensor:
            """h (b l n) → Re(C h), (b l d)."""
            parts = torch.view_as_real(h).flatten(-2).to(x.dtype)
            return linear(parts, _output_map(C).to(x.dtype))

        if len(ways) == 1:
            found = linear_recurrence(
                decay,
                inputs,
                initial_state=None if state is None else state.h,
                return_final_state=True,
                cu_seqlens=cu_seqlens,
            )
            h, last = cast(tuple[Tensor, Tensor], found)
            y = outputs(h, ways[0])
            state = None if state is None else DiagonalState(last)
        else:

            def direction(C: Tensor, b: Tensor) -> Tensor:
                return outputs(cast(Tensor, linear_recurrence(decay, b, cu_seqlens=cu_seqlens)), C)

            y = both_ways(lambda b: direction(ways[0], b), lambda b: direction(ways[1], b), inputs, cu_seqlens)
        return self._activated((2 * y if self.twice else y) + self.skip.to(x.dtype) * x), state

    def _activated(self, y: Tensor) -> Tensor:
        if self.activation == "none":
            return self.dropout(y)
        after = self.dropout(F.gelu(y, approximate="tanh"))
        if self.out2 is None:
            return after
        gate = torch.sigmoid(self.out2(after))
        value = y if self.activation == "half_glu2" else after
        return self.dropout((value if self.out1 is None else self.out1(value)) * gate)


def _input_map(B: Tensor) -> Tensor:
    """B (n d), complex → (2n d): the real and the imaginary part of each row."""
    return torch.view_as_real(B.resolve_conj()).transpose(1, 2).flatten(0, 1)


def _output_map(C: Tensor) -> Tensor:
    """C (d n), complex → (d 2n), of which the product with the two parts of each h is Re(C h)."""
    return torch.stack([C.real, -C.imag], dim=-1).flatten(1)


def complex_of(pairs: Tensor) -> Tensor:
    """(..., 2), the real and imaginary parts, in any precision → (...), complex64 or complex128."""
    return torch.view_as_complex(pairs.to(precision(pairs)).contiguous())
