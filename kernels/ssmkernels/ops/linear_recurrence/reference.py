"""The linear recurrence as it is defined: one step after another."""

from __future__ import annotations

import torch

from ssmkernels.core.recurrence import recurrence
from ssmkernels.core.validate import precision


@recurrence
def compute(h, a, b, log_a):
    """h (b d), and at one time b (b d), a (b d) or, fixed, (1 d) → h twice: the output and the state."""
    wide = precision(b)
    a, b = (x.to(torch.promote_types(x.dtype, wide)) for x in (a, b))
    h = (torch.exp(a) if log_a else a) * h + b
    return h, h
