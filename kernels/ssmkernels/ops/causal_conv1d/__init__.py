"""The short depthwise convolution before the scan in Mamba's block (arXiv 2312.00752, section 3.4)."""

from __future__ import annotations

import importlib

from torch import Tensor

from ssmkernels.core.dispatch import Op
from ssmkernels.core.validate import (
    check_cu_seqlens,
    check_dtypes,
    check_options,
    check_parameters,
    check_same_dtype,
    check_shapes,
    check_written,
    copied,
    precision,
)

__all__ = ["causal_conv1d", "causal_conv1d_step"]

# The module that calls the package of this name. Were it loaded later, it would take the place of the function below.
importlib.import_module(f"{__name__}.causal_conv1d")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A depthwise convolution over time that sees the present and the w-1 inputs before it::

        y_t = bias + Σ_{j=0}^{w-1} weight[:, j] x_{t-(w-1)+j},   through silu where asked for

    so ``weight[:, w-1]`` meets the present input, as in :func:`torch.nn.functional.conv1d` with padding on
    the left.

    Sizes: b batch, l length, d channels, w width, s sequences (b, or as many as ``cu_seqlens`` packs).

    Args:
        x: the input, ``(b, l, d)``.
        weight: ``(d, w)`` with w ≥ 1, in x's dtype or float32 (float64 for float64 input).
        bias: ``(d)``, likewise.
        activation: None or ``"silu"``.
        initial_state: the w-1 inputs before the first, oldest first, ``(s, w-1, d)``, float32 (float64 for
            float64 input); zero if None.
        return_final_state: whether to return the last w-1 inputs as well.
        cu_seqlens: int32 ``(s + 1)``, borders of sequences packed one after another in a batch of one.
        implementation: force one by name; the fastest that can run this call if None.

    Returns:
        y ``(b, l, d)`` in x's dtype, summed in float32 (float64); with ``return_final_state`` also the state
        ``(s, w-1, d)``. A sequence shorter than w-1 shifts the initial state; a width of 1 has an empty
        state.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or name.
    """
    sizes = check_shapes(
        "causal_conv1d",
        {"x": (x, "b l d"), "weight": (weight, "d w"), "bias": (bias, "d")},
        ("x", "weight"),
    )
    cu_seqlens = copied(cu_seqlens)
    s = check_cu_seqlens("causal_conv1d", cu_seqlens, x)
    check_options("causal_conv1d", "bool", return_final_state=return_final_state)
    _check_values("causal_conv1d", x, weight, bias, activation, initial_state, "initial_state")
    check_shapes("causal_conv1d", {"x": (x, "b l d"), "initial_state": (initial_state, "s w-1 d")}, s=s, **sizes)
    y, final_state = _CONV(
        implementation,
        x=x,
        weight=weight,
        bias=bias,
        activation=activation,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
    return (y, final_state) if return_final_state else y


def causal_conv1d_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    implementation: str | None = None,
) -> Tensor:
    """One token of :func:`causal_conv1d`; updates ``state`` in place.

    Args:
        state: the last w-1 inputs, oldest first, ``(b, w-1, d)``, float32 (float64 for float64 input).
            Overwritten.
        x: ``(b, d)``.
        weight: ``(d, w)``.
        bias: ``(d)``.
        activation: None or ``"silu"``.
        implementation: force one by name.

    Returns:
        y ``(b, d)`` in x's dtype.

    Raises:
        TypeError, ValueError: as :func:`causal_conv1d`.
    """
    check_shapes(
        "causal_conv1d_step",
        {"x": (x, "b d"), "weight": (weight, "d w"), "bias": (bias, "d"), "state": (state, "b w-1 d")},
        ("x", "weight", "state"),
    )
    _check_values("causal_conv1d_step", x, weight, bias, activation, state, "state")
    check_written("causal_conv1d_step", "state", state)
    return _STEP(implementation, state=state, x=x, weight=weight, bias=bias, activation=activation)


def _check_values(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None,
    state_name: str,
) -> None:
    """The rules that shapes alone do not tell."""
    check_same_dtype(op, {"x": x})
    check_parameters(op, x, {"weight": weight, "bias": bias})
    check_dtypes(op, {state_name: state}, [precision(x)])
    if weight.shape[1] == 0:
        raise ValueError(f"{op}: `weight` (d w) must be at least 1 wide; got {tuple(weight.shape)}")
    if activation is not None and not (isinstance(activation, str) and activation == "silu"):
        raise ValueError(f"{op}: `activation` must be None or 'silu'; got {activation!r}")


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    s = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = x.new_empty((s, weight.shape[1] - 1, x.shape[2]), dtype=precision(x))
    return x.new_empty(x.shape), state


_CONV = Op(
    "causal_conv1d",
    __name__,
    ("triton", "cpu", "causal_conv1d", "reference"),
    fake=_fake,
    batched={"x": 3, "initial_state": 3},
)
_STEP = Op("causal_conv1d_step", __name__, ("triton", "cpu", "reference"), batched={"x": 2, "state": 3})
