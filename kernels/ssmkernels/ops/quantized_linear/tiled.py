"""A linear map with quantised weights, a tile of outputs after another: dequantised, then a library's product."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmkernels.ops.quantized_linear.reference import dequantized, inputs, spread, whole_numbers

WEIGHTS = 2**22  # that are dequantised at once

Dequantize = Callable[[Any], Tensor]  # arguments of a tile → W (o, k), float32 or float64
Product = Callable[[Tensor, Tensor], Tensor]


def forward(a: Any, _: bool) -> Tensor:
    return by_tiles(a, inputs(a), plain_weights, torch.matmul)


def backward(a: Any, _: Any, grads: Any) -> dict[str, Any]:
    return gradients(a, grads, plain_weights, torch.matmul)


def plain_weights(a: Any) -> Tensor:
    return dequantized(a.weight, a.scales, a.zeros, a.group_size, a.x.shape[-1], precision(a.x))


def as_rows(x: Tensor) -> Tensor:
    """``(..., n)`` as a matrix."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def by_tiles(a: Any, x: Tensor, weights: Dequantize, product: Product) -> Tensor:
    """y by ``product`` of matrices, from x as it is multiplied."""
    (y,) = a.declared.outputs(a)
    x, out = as_rows(x), as_rows(y)
    for outputs, tile in _tiles(a):
        part = product(x, weights(tile).T)
        out[:, outputs] = part if tile.bias is None else part + tile.bias
    return y


def gradients(a: Any, grads: Any, weights: Dequantize, product: Product) -> dict[str, Any]:
    """Those that are wanted; of weights only where they are floating-point numbers."""
    dy = as_rows(grads.y).to(precision(a.x))
    x = as_rows(inputs(a)) if {"scales", "weight"} & {*grads.wanted} else None
    dx, dscales, dweight = dy.new_zeros(dy.shape[0], a.x.shape[-1]), [], []
    for outputs, tile in _tiles(a):
        part = dy[:, outputs]
        if "x" in grads.wanted:
            dx += product(part, weights(tile))
        if x is not None:
            dw = product(part.T, x)
            dweight.append(dw)
            if a.scales is not None:
                dscales.append(_by_group(tile, dw))
    found = {"x": dx.view(a.x.shape), "bias": dy.sum(0)}
    if dweight:
        found["weight"] = torch.cat(dweight)
    if dscales:
        found["scales"] = torch.cat(dscales)
    return found


def _tiles(a: Any) -> Iterator[tuple[slice, Any]]:
    """Outputs, and the arguments for them alone."""
    outputs, inputs = a.weight.shape[0], a.x.shape[-1]
    each = max(1, WEIGHTS // max(1, inputs))
    for first in range(0, max(outputs, 1), each):
        some = slice(first, first + each)
        yield (
            some,
            a._replace(
                **{
                    name: None if tensor is None else tensor[some]
                    for name in ("weight", "scales", "zeros", "bias")
                    for tensor in [getattr(a, name)]
                }
            ),
        )


def _by_group(a: Any, dw: Tensor) -> Tensor:
    """The gradient of the scales ``(o, g)`` from that of W ``(o, k)``."""
    k, groups = a.x.shape[-1], torch.arange(a.scales.shape[1], device=dw.device)
    each = dw * whole_numbers(a.weight, a.zeros, a.group_size, k)
    return each.new_zeros(a.scales.shape).index_add_(1, spread(groups[None], a.group_size, k)[0], each)
