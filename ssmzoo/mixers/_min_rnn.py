"""What minGRU and minLSTM share (Feng et al. 2024, arXiv 2410.01201): all but the gates.

Glossary: b batch, l length, d: d_inner, channels of the recurrence. For x (b l d_model)::

    h̃_t = g(v_t)                    (b l d), the candidate; v_t comes from x_t alone, not from the state
    h_t = f_t h_{t-1} + i_t h̃_t     (b l d), the state; f_t and i_t are in (0, 1)
    out = to_out(h)                 (b l d_model)

    g(v) = v + 1/2 for v ≥ 0, σ(v) below: positive and continuous

The paper trains in log space, by a cumulative logarithm of sums of exponentials of log f and log(i h̃), for which the
candidates must be positive. Here the recurrence itself runs one step after another, with f given by its logarithm; the
results are the same, and candidates may have either sign.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels import linear_recurrence
from ssmkernels.core.validate import precision
from ssmzoo.linear import Linear
from ssmzoo.mixer import Mixer
from ssmzoo.state import State


@dataclasses.dataclass
class MinRNNState(State):
    """The last h of each sequence."""

    h: Tensor  # (s, d), float32


def positive(v: Tensor) -> Tensor:
    """g: v + 1/2 where v ≥ 0, and σ(v) below."""
    return torch.where(v >= 0, v + 0.5, torch.sigmoid(v))


@dataclasses.dataclass(kw_only=True)
class MinRNNOptions:
    """The options of both.

    Attributes:
        expansion_factor: the recurrence has ⌊expansion_factor · d_model⌋ channels.
        proj_out: a linear map after the recurrence; if None, where expansion_factor is not 1.
        positive: whether the candidates pass g, as in the paper's log-space form; otherwise they are linear, as in its
            plain form.
        bias: a bias on the map before the recurrence, as the paper has it; the published code has none.
    """

    expansion_factor: float = 1.0
    proj_out: bool | None = None
    positive: bool = True
    bias: bool = False


class MinRNN(Mixer):
    """A linear recurrence with gates and candidates that see the input alone.

    Args:
        d_model: width of input and output.
        o: the options.
    """

    crosses_in_ops = True
    options_class = MinRNNOptions
    state_class = MinRNNState
    residual_projections: tuple[str, ...] = ()

    def __init__(self, d_model: int, o: MinRNNOptions):
        super().__init__(d_model)
        self.d_inner, proj_out = int(o.expansion_factor * d_model), o.proj_out
        if self.d_inner < 1:
            name, given = type(self).__name__, f"{o.expansion_factor} · {d_model}"
            raise ValueError(f"{name}: `expansion_factor` · d_model must be at least 1; got {given}")
        if proj_out is None:
            proj_out = self.d_inner != d_model
        if not proj_out and self.d_inner != d_model:
            name, sizes = type(self).__name__, f"{self.d_inner} channels of d_model={d_model}"
            raise ValueError(f"{name}: `proj_out` must be True where `expansion_factor` makes {sizes}; got False")
        self.positive = o.positive
        self.to_out: nn.Module = Linear(self.d_inner, d_model, bias=False) if proj_out else nn.Identity()
        if proj_out:
            self.residual_projections = ("to_out",)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (b l d_model) → v before g, log f and the input gate i, all (b l d), the gates in float32 (float64)."""
        raise NotImplementedError

    def initial_state(self, batch_size: int, max_length: int | None = None) -> MinRNNState:
        return MinRNNState(self.like(wide=True).new_zeros(batch_size, self.d_inner))

    def mixing_flops(self, context: int) -> float:
        """Two of the recurrence and one of the input gate for each channel."""
        return 3.0 * self.d_inner

    def mix(self, x: Tensor, state: MinRNNState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, MinRNNState | None]:
        v, log_f, i = self.gates(x)
        v = v.to(precision(v))
        found = linear_recurrence(
            log_f,
            (i * (positive(v) if self.positive else v)).to(x.dtype),
            log_a=True,
            initial_state=None if state is None else state.h,
            return_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        h, last = cast(tuple[Tensor, Tensor], found)
        return self.to_out(h), None if state is None else MinRNNState(last)


def log_sigmoid(x: Tensor) -> Tensor:
    """log σ(x), in float32 at least: next to 1, half precision has no values for a decay."""
    return -F.softplus(-x.to(precision(x)))
