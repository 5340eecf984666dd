"""minGRU (Feng et al. 2024, arXiv 2410.01201, section 3.1 and appendix B.2).

Glossary: b batch, l length, d: d_inner, channels of the recurrence; g as in :mod:`ssmzoo.mixers._min_rnn`. For
x (b l d_model)::

    v_t, k_t = to_hidden_and_gate(x_t)                (b l d) each
    z_t      = σ(k_t)                                 (b l d), the update gate
    h_t      = (1 - z_t) h_{t-1} + z_t g(v_t)         (b l d), the state
    out      = to_out(h)                              (b l d_model), where there is such a map

Against the GRU, neither the gate nor the candidate sees h_{t-1}, so the recurrence is linear in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmzoo.linear import Linear
from ssmzoo.mixers._min_rnn import MinRNN, MinRNNOptions, log_sigmoid
from ssmzoo.registry import register_mixer


@register_mixer("mingru")
class MinGRU(MinRNN):
    """A GRU whose gate and candidate see the input alone, so that it is a linear recurrence.

    Args:
        d_model: width of input and output.
        options: those of :class:`~ssmzoo.mixers._min_rnn.MinRNNOptions`.
    """

    def __init__(self, d_model: int, **options: Any):
        o = MinRNNOptions(**options)
        super().__init__(d_model, o)
        self.to_hidden_and_gate = Linear(d_model, 2 * self.d_inner, bias=o.bias)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v, k = self.to_hidden_and_gate(x).chunk(2, dim=-1)
        return v, log_sigmoid(-k), torch.sigmoid(k.to(precision(k)))
