"""Linear maps whose weights are kept in 8 or 4 bits, or in half precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.declare import op
from ssmkernels.core.validate import REAL, check_dtypes, check_range, precision

__all__ = ["quantized_linear"]

BLOCK = 32  # 4-bit weights that are packed together, into 16 bytes
SPAN = 128  # inputs that are rounded together, at most


def _check(
    name: str,
    sizes: dict[str, int],
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    group_size: int | None,
    activations: str | None,
    **_: Any,
) -> None:
    inputs = sizes["k"]
    check_dtypes(name, {"weight": weight}, [torch.int8, torch.uint8, *REAL])
    if activations is not None and weight.dtype != torch.uint8:
        raise ValueError(
            f"{name}: `activations` must be None beside a `weight` that is not in 4 bits; got {activations!r} beside "
            f"{str(weight.dtype).removeprefix('torch.')}"
        )
    blocks = -(-inputs // BLOCK) * (BLOCK // 2)
    wanted, what = (blocks, "packed 4-bit weights") if weight.dtype == torch.uint8 else (inputs, "weights")
    if sizes["c"] != wanted:
        raise ValueError(
            f"{name}: `weight` must have {wanted} columns, {what} for the {inputs} channels of `x`; got {sizes['c']}"
        )
    if weight.is_floating_point():
        given = {"scales": scales, "zeros": zeros, "group_size": group_size}
        for option, value in given.items():
            if value is not None:
                raise ValueError(f"{name}: `{option}` must be None beside a `weight` of floating-point numbers")
        return
    if scales is None:
        raise ValueError(f"{name}: `scales` must be given beside a `weight` of integers; got None")
    check_dtypes(name, {"scales": scales}, dict.fromkeys((torch.float32, torch.bfloat16, torch.float16, precision(x))))
    check_dtypes(name, {"zeros": zeros}, [torch.uint8])
    if zeros is not None and weight.dtype == torch.int8:
        raise ValueError(f"{name}: `zeros` must be None beside an int8 `weight`, which counts from 0")
    check_range(name, BLOCK, group_size=group_size)
    if group_size is not None and group_size % BLOCK:
        raise ValueError(f"{name}: `group_size` must be a multiple of {BLOCK}; got {group_size}")
    if activations is not None and group_size is not None and group_size % min(group_size, SPAN):
        raise ValueError(
            f"{name}: `group_size` must be at most {SPAN} or a multiple of it beside int8 `activations`; "
            f"got {group_size}"
        )
    groups = 1 if group_size is None else -(-inputs // group_size)
    if sizes["g"] != groups:
        raise ValueError(
            f"{name}: `scales` must have {groups} columns, one for each group of {group_size or inputs} channels of "
            f"`x`; got {sizes['g']}"
        )


@op(
    shapes="""
        x: ... k
        weight: o c
        scales zeros: o g
        bias: o
    """,
    returns="y: ... o",
    wide="bias",
    own="weight scales zeros",
    choices={"activations": ("int8",)},
    check=_check,
    implementations=("triton", "cpu", "tiled", "reference"),
)
def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int | None = None,
    activations: str | None = None,
    implementation: str | None = None,
) -> Tensor:
    """A linear map with weights W that are kept in few bits::

        W[o, i] = scales[o, i // group_size] · (q[o, i] − zero[o, i // group_size])
        y = x Wᵀ + bias

    The products are summed in float32 (float64 for float64 input), whatever the weights are kept in. Sizes: k inputs, o
    outputs, g groups of inputs.

    With ``activations="int8"``, for 4-bit weights, x is rounded first, in spans of inputs: a group's, or 128 where
    groups are larger. Each span of a row has one scale::

        c = max(max |x| of the span / 127, 2⁻¹⁰⁰)      in float32
        x ≈ c · round(x / c)                           to the nearest, ties to even

    An input is then off by at most c / 2, and kernels multiply whole numbers. Gradients are those of x as it came (the
    straight-through estimator).

    In 4 bits q is packed in blocks of 32 inputs, padded with any numbers to whole blocks: byte j of a block's 16 has
    input j in its lower half and input 16 + j in its upper one.

    Args:
        x: ``(..., k)``.
        weight: q, ``(o, k)`` int8 with zero = 0; or ``(o, 16 ⌈k / 32⌉)`` uint8, packed; or W itself, ``(o, k)`` of any
            floating-point dtype.
        scales: ``(o, g)`` with g = ⌈k / group_size⌉, float32, bfloat16 or float16, or x's dtype; beside integers only.
        zeros: of 4-bit weights, ``(o, g)`` uint8, at most 128; 8 everywhere if None.
        bias: ``(o)``, in x's dtype or float32 (float64 for float64 input).
        group_size: inputs that share a scale and a zero, a multiple of 32; all k if None.
        activations: "int8" rounds x, beside 4-bit weights in groups of at most 128 inputs or multiples of 128; None
            takes x as it is.

    Returns:
        ``(..., o)`` in x's dtype.

    Groups with scales and zeros are those of GPTQ (Frantar et al. 2022, arXiv 2210.17323, section 4). Rounding x as it
    comes, by its largest magnitude, is absmax quantisation (Dettmers et al. 2022, arXiv 2208.07339, section 2.1).
    """
