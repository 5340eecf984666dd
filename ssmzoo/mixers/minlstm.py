"""minLSTM (Feng et al. 2024, arXiv 2410.01201, section 3.2 and appendix B.3).

Glossary: b batch, l length, d: d_inner, channels of the recurrence; g as in :mod:`ssmzoo.mixers._min_rnn`. For
x (b l d_model)::

    v_t, p_t, q_t = to_hidden_and_f_i_gate(x_t)       (b l d) each
    f_t, i_t      = σ(p_t + forget_bias), σ(q_t)      (b l d), the forget and input gates
    f'_t, i'_t    = f_t / (f_t + i_t), i_t / (f_t + i_t)
    h_t           = f'_t h_{t-1} + i'_t g(v_t)        (b l d), the state
    out           = to_out(h)                         (b l d_model), where there is such a map

Against the LSTM, neither gates nor candidate see h_{t-1}, and there is no output gate. The gates are divided by their
sum, so that the scale of the state does not depend on the length; without ``normalize`` they are not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmzoo.linear import Linear
from ssmzoo.mixers._min_rnn import MinRNN, MinRNNOptions, log_sigmoid
from ssmzoo.registry import register_mixer


@dataclasses.dataclass(kw_only=True)
class MinLSTMOptions(MinRNNOptions):
    """Those of both networks, and two more.

    Attributes:
        normalize: whether forget and input gate are divided by their sum.
        forget_bias: added to what the forget gate is the sigmoid of; the paper finds that larger ones train faster.
    """

    normalize: bool = True
    forget_bias: float = 0.0


@register_mixer("minlstm")
class MinLSTM(MinRNN):
    """An LSTM whose gates and candidate see the input alone, so that it is a linear recurrence.

    Args:
        d_model: width of input and output.
        options: those of :class:`MinLSTMOptions`.
    """

    options_class = MinLSTMOptions

    def __init__(self, d_model: int, **options: Any):
        o = MinLSTMOptions(**options)
        super().__init__(d_model, o)
        self.normalize, self.forget_bias = o.normalize, o.forget_bias
        self.to_hidden_and_f_i_gate = Linear(d_model, 3 * self.d_inner, bias=o.bias)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v, p, q = self.to_hidden_and_f_i_gate(x).chunk(3, dim=-1)
        log_f, q = log_sigmoid(p + self.forget_bias), q.to(precision(q))
        if not self.normalize:
            return v, log_f, torch.sigmoid(q)
        ahead = log_f - log_sigmoid(q)  # f' = σ(log f - log i), i' = 1 - f'
        return v, log_sigmoid(ahead), torch.sigmoid(-ahead)
