"""A tensor as Triton kernels take it: its pointer and its strides are one argument."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Strided(NamedTuple):
    """A tensor (batch, time, head, channel) with its strides in elements.

    A stride of 0 says that all indices of an axis share a number, or that there is no such axis. In a kernel ``at`` is
    a pointer, which ``head_of`` of :mod:`ssmkernels.core.triton_pieces` moves on to one head.
    """

    at: Any
    batch: Any
    time: Any
    head: Any
    step: Any


def strided(x: Tensor | None) -> Strided | None:
    """x of shape (b l h c) or (b l h), or None."""
    return None if x is None else Strided(x, *x.stride(), *(4 - x.ndim) * (0,))


def strided_token(x: Tensor | None) -> Strided | None:
    """x of one token, of shape (b h c) or (b h), or None."""
    return None if x is None else Strided(x, x.stride(0), 0, *x.stride()[1:], *(3 - x.ndim) * (0,))
