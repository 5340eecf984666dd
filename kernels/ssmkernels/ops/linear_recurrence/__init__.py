"""The diagonal linear recurrence of S5, LRU, RG-LRU, HGRN and minGRU (Martin and Cundy 2018, arXiv 1709.04057)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.core.declare import op
from ssmkernels.core.steps import step_of
from ssmkernels.core.validate import COMPLEX, REAL, check_dtypes, precision

__all__ = ["linear_recurrence", "linear_recurrence_step"]


def _check(name: str, sizes: dict[str, int], b: Tensor, a: Tensor, **others: Any) -> None:
    """a real, or complex where b is; states in the precision of sums, complex where b is."""
    check_dtypes(name, {"b": b}, (*REAL, *COMPLEX))
    wide = precision(b)
    real = b.dtype if not b.is_complex() else wide
    check_dtypes(name, {"a": a}, dict.fromkeys((b.dtype, real, wide)))
    states = {key: x for key, x in others.items() if key in ("state", "initial_state")}
    check_dtypes(name, states, [b.dtype if b.is_complex() else wide])


@op(
    shapes="""
        b: b l d
        a: b l d | d
        initial_state: s d
    """,
    returns="h: b l d: b; final_state: s d: b sums if return_final_state",
    own="a b initial_state",
    check=_check,
    implementations=("triton", "cpu", "reference"),
)
def linear_recurrence(
    a: Tensor,
    b: Tensor,
    *,
    log_a: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A linear recurrence in which every channel is by itself::

        h_t = a_t h_{t-1} + b_t

    computed one step after another, so that it is exact where a is 0 (a reset) or 1, and where |a| is above 1.

    Sizes: b batch, l length, d channels, s sequences (b, or as many as ``cu_seqlens`` packs).

    Args:
        a: the decay, ``(b, l, d)``, or ``(d)`` where it is the same at all times; real, or complex where b is. In b's
            dtype, or float32 beside half precision.
        b: the input, ``(b, l, d)``, real or complex.
        log_a: whether ``a`` holds logarithms of the decay.
        initial_state: h before the first step, ``(s, d)``; zero if None.
        return_final_state: whether to return h after the last step as well.

    Returns:
        h ``(b, l, d)`` in b's dtype; with ``return_final_state`` also the last one, ``(s, d)``, complex where b is.
    """


@step_of(linear_recurrence)
def linear_recurrence_step(
    state: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    log_a: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """One token of :func:`linear_recurrence`; updates ``state`` in place.

    Args:
        state: h, ``(b, d)``, float32 (float64 for float64 input), complex where b is. Overwritten.
        a: ``(b, d)`` or ``(d)``.
        b: ``(b, d)``.
        log_a: whether ``a`` holds logarithms of the decay.

    Returns:
        h ``(b, d)`` in b's dtype.
    """
