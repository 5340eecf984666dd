"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467), with gate and residual."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.core.declare import op

__all__ = ["rms_norm"]


def _check(name: str, sizes: dict[str, int], group_size: int | None, **_: Any) -> None:
    if group_size is not None and (group_size < 1 or sizes["d"] % group_size):
        raise ValueError(f"{name}: `group_size` must divide the {sizes['d']} channels of `x`; got {group_size}")


@op(
    shapes="""
        x: ... d
        weight: d
        gate residual: ... d
    """,
    returns="y: ... d; summed: ... d: residual if residual",
    wide="weight residual",
    check=_check,
    implementations=("triton", "cpu", "reference"),
)
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    gate: Tensor | None = None,
    norm_before_gate: bool = True,
    group_size: int | None = None,
    residual: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Divides the channels of every position by their root mean square::

        norm(x) = x / √(mean(x²) + eps) · weight

        y = norm(r)                 where r = x, or x + residual
        y = norm(r) · silu(gate)    with a gate
        y = norm(r · silu(gate))    with a gate and norm_before_gate=False, as in Mamba-2

    Args:
        x: ``(..., d)``.
        weight: ``(d)``, in x's dtype or float32 (float64 for float64 input).
        eps: added to the mean of squares.
        gate: shape and dtype of x.
        norm_before_gate: whether the gate comes after the norm or before it.
        group_size: the mean is taken over groups of this many neighbouring channels; over all of them if
            None.
        residual: what comes in beside x, of its shape, in its dtype or float32 (float64 for float64 input).

    Returns:
        y ``(..., d)`` in x's dtype, computed in float32 (float64 for float64 input); with a residual also r,
        in the residual's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, or groups that do not
            divide d.
    """
