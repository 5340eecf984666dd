"""The packages take dtypes in more mixtures than our ops do; what is brought together here loses nothing."""

from __future__ import annotations

import functools
from typing import overload

import torch
from torch import Tensor

from ssmkernels.core.validate import check_borders, check_dtypes, check_shapes, precision

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


def int32_borders(op: str, cu_seqlens: Tensor, length: int | None, name: str = "cu_seqlens") -> Tensor:
    """Borders of packed sequences as our ops take them; they are checked before large ones could wrap around.

    Args:
        length: of all sequences; None if only the borders tell it.

    Raises:
        TypeError, ValueError: no integers ``(s + 1)`` that rise from 0 to the length.
    """
    check_shapes(op, {name: (cu_seqlens, "borders")}, (name,))
    check_dtypes(op, {name: cu_seqlens}, INDICES)
    if not len(cu_seqlens):
        raise ValueError(f"{op}: `{name}` must have shape (s + 1); got (0,)")
    check_borders(op, cu_seqlens, int(cu_seqlens[-1]) if length is None else length, name)
    return cu_seqlens.int()
