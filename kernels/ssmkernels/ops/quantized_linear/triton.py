"""A linear map with quantised weights in Triton; its gradients are those of the tiled implementation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.triton_support import kernels, missing, on_device_of, wrong_device
from ssmkernels.native import rows
from ssmkernels.ops.quantized_linear import SPAN
from ssmkernels.ops.quantized_linear.tiled import as_rows, backward

__all__ = ["backward", "forward", "missing", "offline_cases", "unsupported"]

ROWS, OUTPUTS = 16, 32  # of a program


def unsupported(a: Any) -> str | None:
    for name in ("x", "weight", "scales"):
        tensor = getattr(a, name)
        if tensor is not None and tensor.dtype == torch.float64:
            return f"sums are in float32; `{name}` is float64"
    return "no inputs, outputs or rows" if 0 in (*a.x.shape, a.weight.shape[0]) else wrong_device(a)


def forward(a: Any, _: bool) -> Tensor:
    (y,) = a.declared.outputs(a)
    x = as_rows(rows(a.x))
    weight, scales, zeros, bias = (None if t is None else t.contiguous() for t in (a.weight, a.scales, a.zeros, a.bias))
    count, size, outputs = x.shape[0], x.shape[1], a.weight.shape[0]
    with on_device_of(x):
        kernels(__package__).forward[(-(-count // ROWS), -(-outputs // OUTPUTS))](
            x=x,
            weight=weight,
            scales=scales,
            zeros=zeros,
            bias=bias,
            y=y,
            x_row=x.stride(0),
            rows=count,
            K=size,
            O=outputs,
            GROUP=a.group_size or size,
            PACKED=a.weight.dtype == torch.uint8,
            SPAN=0 if a.activations is None else min(a.group_size or SPAN, SPAN),
            ROWS=ROWS,
            OUTPUTS=OUTPUTS,
            num_warps=4,
        )
    return y


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launch(dtype: torch.dtype, weight: torch.dtype, scaled: bool, activations: str | None) -> None:
        packed, k, o = weight == torch.uint8, 768, 96
        values = torch.empty(o, k // 2 if packed else k, dtype=weight, device="meta")
        groups = torch.empty(o, k // 64, device="meta")
        x = torch.empty(5, k, dtype=dtype, device="meta")
        zeros = torch.empty_like(groups, dtype=torch.uint8) if packed else None
        bias = torch.empty(o, dtype=dtype, device="meta")
        scales = groups if scaled else None
        forward(OPS["quantized_linear"].declared.Arguments(x, values, scales, zeros, bias, 64, activations), True)

    for dtype, weight, scaled, activations in (
        (torch.bfloat16, torch.uint8, True, None),
        (torch.float32, torch.uint8, True, "int8"),
        (torch.float32, torch.int8, True, None),
        (torch.float16, torch.float16, False, None),
    ):
        name, of = (str(x).removeprefix("torch.") for x in (dtype, weight))
        launched = functools.partial(launch, dtype, weight, scaled, activations)
        yield f"{name}, weights {of}" + (f", activations {activations}" if activations else ""), launched
