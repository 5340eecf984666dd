"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467), with gate and residual."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.core.dispatch import Op
from ssmkernels.core.validate import check_options, check_parameters, check_same_dtype, check_shapes, once

__all__ = ["rms_norm"]


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
        implementation: force one by name.

    Returns:
        y ``(..., d)`` in x's dtype, computed in float32 (float64 for float64 input); with a residual also r,
        in the residual's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, or groups that do not
            divide d.
    """
    once(_check, x, weight, eps, gate, norm_before_gate, group_size, residual)
    y, summed = _NORM(
        implementation,
        x=x,
        weight=weight,
        eps=eps,
        gate=gate,
        norm_before_gate=norm_before_gate,
        group_size=group_size,
        residual=residual,
    )
    return y if residual is None else (y, summed)


def _check(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None,
    norm_before_gate: bool,
    group_size: int | None,
    residual: Tensor | None,
) -> None:
    if not isinstance(x, Tensor) or x.ndim == 0:
        came = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"rms_norm: `x` must be a tensor of shape (..., d); got {came}")
    shape = " ".join([*(f"n{i}" for i in range(1, x.ndim)), "d"])
    sizes = check_shapes(
        "rms_norm",
        {"x": (x, shape), "weight": (weight, "d"), "gate": (gate, shape), "residual": (residual, shape)},
        ("weight",),
    )
    check_same_dtype("rms_norm", {"x": x, "gate": gate})
    check_parameters("rms_norm", x, {"weight": weight, "residual": residual})
    check_options("rms_norm", "number", eps=eps)
    check_options("rms_norm", "bool", norm_before_gate=norm_before_gate)
    check_options("rms_norm", "int or None", group_size=group_size)
    if group_size is not None and (group_size < 1 or sizes["d"] % group_size):
        raise ValueError(f"rms_norm: `group_size` must divide the {sizes['d']} channels of `x`; got {group_size}")


def _fake(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None,
    norm_before_gate: bool,
    group_size: int | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    summed = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    return torch.empty_like(x, memory_format=torch.contiguous_format), summed


_NORM = Op("rms_norm", __name__, ("cpu", "reference"), fake=_fake, batched={"x": 2, "gate": 2, "residual": 2})
