"""The short depthwise convolution before the scan in Mamba's block (arXiv 2312.00752, section 3.4)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.core.declare import op
from ssmkernels.core.steps import step_of

__all__ = ["causal_conv1d", "causal_conv1d_step"]


def _check(name: str, sizes: dict[str, int], weight: Tensor, **_: Any) -> None:
    if sizes["w"] == 0:
        raise ValueError(f"{name}: `weight` (d w) must be at least 1 wide; got {tuple(weight.shape)}")


@op(
    shapes="""
        x: b l d
        weight: d w
        bias: d
        initial_state: s w-1 d
    """,
    returns="y: b l d; final_state: s w-1 d: sums if return_final_state",
    wide="weight bias",
    choices={"activation": ("silu",)},
    check=_check,
    implementations=("triton", "cpu", "causal_conv1d", "reference"),
)
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

    Returns:
        y ``(b, l, d)`` in x's dtype, summed in float32 (float64); with ``return_final_state`` also the state
        ``(s, w-1, d)``. A sequence shorter than w-1 shifts the initial state; a width of 1 has an empty
        state.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or name.
    """


@step_of(causal_conv1d)
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

    Returns:
        y ``(b, d)`` in x's dtype.
    """
