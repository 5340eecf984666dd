"""NaN and infinity at keys and values that a query does not see.

Hidden keys get a weight of 0, but 0 · NaN is NaN: a matrix product of weights and values spreads what one value holds
to every row. Looking for NaN before each call would cost a pass over all values, so a call looks at its output instead
and computes once more, carefully, where that is not finite. See docs/attention.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssmkernels.core.plain import readable


def spread(out: Tensor) -> bool:
    """Whether some number is not finite, so that rows which see no NaN or infinity may hold one.

    Always False where numbers cannot be read at once: on a GPU, in compiled code and under transforms.
    """
    return readable(out) and not finite(out)


def finite(x: Tensor) -> bool:
    """Whether all numbers are, by their sum: a few microseconds for a small tensor, and a pass at memory's speed."""
    return math.isfinite((x.detach() if x.requires_grad else x).sum().item())


def repaired(quick: Tensor, careful: Tensor) -> Tensor:
    """The quick result; the careful one where only that is a number."""
    return torch.where(quick.isfinite() | careful.isnan(), quick, careful)


def met(seen: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``v`` (n c d) with 0 for NaN and infinity; and (n r d), whether a row that sees (n r c) meets one of them."""
    finite = v.isfinite()
    return torch.where(finite, v, 0), torch.bmm(seen.to(v.dtype), (~finite).to(v.dtype)) > 0
