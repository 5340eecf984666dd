"""The causal depthwise convolution as a plain sum over its taps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.packing import spans
from ssmkernels.core.validate import precision


def compute(a: Any) -> tuple[Tensor, Tensor]:
    x, state, cu_seqlens = a.x, a.initial_state, a.cu_seqlens
    s = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if state is None:
        state = x.new_zeros(s, a.weight.shape[1] - 1, x.shape[2], dtype=precision(x))
    if cu_seqlens is None:
        return _one_batch(x, a.weight, a.bias, a.activation, state)
    ys, states = [x[:, :0]], [state[:0]]
    for i, time in spans(cu_seqlens):
        y, last = _one_batch(x[:, time], a.weight, a.bias, a.activation, state[i : i + 1])
        ys.append(y)
        states.append(last)
    return torch.cat(ys, dim=1), torch.cat(states)


def step(a: Any) -> Tensor:
    y, last = _one_batch(a.x[:, None], a.weight, a.bias, a.activation, a.state)
    a.state.copy_(last)
    return y[:, 0]


def _one_batch(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """x (b l d) and the inputs before it (b w-1 d) → y (b l d), the last inputs (b w-1 d)."""
    wide = precision(x)
    l, w = x.shape[1], weight.shape[1]
    inputs = torch.cat([state, x.to(wide)], dim=1)  # (b w-1+l d)
    weight = weight.to(wide)
    y = torch.zeros_like(x, dtype=wide)  # (b l d)
    for j in range(w):
        y = y + weight[:, j] * inputs[:, j : j + l]
    if bias is not None:
        y = y + bias.to(wide)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), inputs[:, l:].clone()
