"""The packages take dtypes in more mixtures than our ops do; what is brought together here loses nothing."""

from __future__ import annotations

import functools
from typing import overload

import torch
from torch import Tensor

from ssmkernels.core.validate import precision

INDICES = (torch.int32, torch.int64)


def together(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that holds all of these activations."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors if t is not None))


@overload
def beside(t: Tensor, x: Tensor) -> Tensor: ...
@overload
def beside(t: Tensor | None, x: Tensor) -> Tensor | None: ...
def beside(t: Tensor | None, x: Tensor) -> Tensor | None:
    """A weight as our ops want it beside the activation ``x``: in x's dtype or at least float32 (float64)."""
    wide = precision(x)
    if t is None or t.dtype in (x.dtype, wide) or not (t.is_floating_point() or t.is_complex()):
        return t  # integers are for the op to refuse
    return t.to(torch.promote_types(t.dtype, wide))
