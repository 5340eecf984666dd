"""xLSTM's scalar memory, one token after another: arXiv 2405.04517, equations 8 to 17 and 36 to 41."""

from __future__ import annotations

import torch
from einops import einsum, rearrange

from ssmkernels.core.recurrence import recurrence
from ssmkernels.core.validate import precision
from ssmkernels.ops.mlstm.reference import log_sigmoid


@recurrence
def compute(state, x, R, bias):
    """c, n, h, m (b h p), and at one time x (b 4 h p) → y (b h p) and c, n, h, m."""
    c, n, h, m = state
    wide = precision(x)
    gates = x.to(wide) + einsum(h, R.to(wide), "b h i, h i g p -> b g h p")
    if bias is not None:
        gates = gates + rearrange(bias.to(wide), "h g p -> g h p")
    i, f, z, o = gates.unbind(1)  # (b h p) each
    kept = torch.where(n == 0, -torch.inf, log_sigmoid(f) + m)
    m = torch.maximum(kept, i)
    decay, weight = torch.exp(kept - m), torch.exp(i - m)
    c = decay * c + weight * torch.tanh(z)
    n = decay * n + weight
    h = torch.sigmoid(o) * (c / n)
    return h, (c, n, h, m)
