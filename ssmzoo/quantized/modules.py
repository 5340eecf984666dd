"""Modules in the place of linear maps and embeddings, with their weights in few bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels import quantized_linear
from ssmkernels.native.calls import Calls
from ssmkernels.ops.quantized_linear.reference import dequantized
from ssmzoo.quantized.rounding import Rounded
from ssmzoo.quantized.scheme import Scheme


class QuantizedMap(nn.Module):
    """A matrix of weights in few bits.

    Args:
        inputs, outputs: the matrix is ``(outputs, inputs)``.
        scheme: how its numbers are kept.
        like: a tensor of the dtype that the map computes in, on the device of its weights.

    Attributes:
        weight_q: int8 ``(outputs, inputs)``, or 4-bit numbers as :func:`ssmkernels.quantized_linear` packs them.
        scales: ``(outputs, groups)``; float32 beside 8 bits, bfloat16 beside 4, also when the module moves to another
            dtype.
        zeros: uint8 ``(outputs, groups)`` beside 4 bits, else None.
        input_scale: ``(inputs)``, powers of two that inputs are multiplied by, ones before :meth:`scale_inputs`; None
            where the scheme has none.
        dtype: of what it gives; ``to()`` changes it as it would a weight's.
    """

    weight_q: Tensor
    scales: Tensor
    zeros: Tensor | None
    input_scale: Tensor | None

    def __init__(self, inputs: int, outputs: int, scheme: Scheme, like: Tensor):
        super().__init__()
        self.inputs, self.outputs, self.scheme, self.dtype = inputs, outputs, scheme, like.dtype
        groups, four = scheme.groups(inputs), scheme.bits == 4
        integers, scales = (torch.uint8, torch.bfloat16) if four else (torch.int8, torch.float32)
        new = like.new_empty
        self.register_buffer("weight_q", new(outputs, scheme.columns(inputs), dtype=integers))
        self.register_buffer("scales", new(outputs, groups, dtype=scales))
        self.register_buffer("zeros", new(outputs, groups, dtype=torch.uint8) if four else None)
        self.register_buffer("input_scale", like.new_ones(inputs) if scheme.input_scale else None)

    def take(self, rounded: Rounded) -> None:
        """Makes these weights its own."""
        self.weight_q, self.scales, self.zeros = rounded

    def scale_inputs(self, scale: Tensor) -> None:
        """Multiplies inputs by powers of two ``(inputs)`` from now on."""
        assert self.input_scale is not None
        self.input_scale = scale.to(self.input_scale)

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        """The weights ``(outputs, inputs)``, float32."""
        size = self.scheme.group_size
        weight = dequantized(self.weight_q, self.scales, self.zeros, size, self.inputs, torch.float32)
        return weight if self.input_scale is None else weight * self.input_scale

    def like(self) -> Tensor:
        """An empty tensor of the dtype of what it gives, on the device of the weights."""
        return self.scales.new_empty(0, dtype=self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As PyTorch's; the scales keep their dtype, and the module remembers which one it was to move to."""
        scales = self.scales
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scales.device)).dtype
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        group = self.scheme.group_size
        return f"{self.inputs}, {self.outputs}, bits={self.scheme.bits}" + (f", group_size={group}" if group else "")


class QuantizedLinear(QuantizedMap):
    """A linear map ``(..., inputs) → (..., outputs)``; gradients reach its input and bias, not its weights.

    Args:
        linear: the map whose place it takes, with its bias; the weights are yet to come by :meth:`take`.
        scheme: how they are kept.
    """

    def __init__(self, linear: nn.Linear, scheme: Scheme):
        super().__init__(linear.in_features, linear.out_features, scheme, linear.weight)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.input_scale is not None:
            x = x * self.input_scale.to(x.dtype)
        return quantized_linear(x, *self._weights(), **self._options())

    def prepare_step(self, calls: Calls, x: Tensor) -> Tensor:
        """Adds the map's native call for x ``(b, inputs)`` to those of a token.

        Raises:
            NotPreparedError: x is float64, or another implementation than the native one would run.
        """
        if self.input_scale is not None:
            x = calls.activated(x, "identity", factor=self.input_scale.expand(len(x), -1))
        return calls.op(quantized_linear, x, *self._weights(), **self._options())

    def _weights(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.weight_q, self.scales, self.zeros, self.bias

    def _options(self) -> dict[str, Any]:
        return {"group_size": self.scheme.group_size, "activations": self.scheme.activations}


class QuantizedEmbedding(QuantizedMap):
    """Vectors by ids, ``(...)`` → ``(..., inputs)``: rows of a matrix that a head may share.

    Args:
        embedding: the one whose place it takes.
        scheme: how its numbers are kept.
    """

    def __init__(self, embedding: nn.Embedding, scheme: Scheme):
        super().__init__(embedding.embedding_dim, embedding.num_embeddings, scheme, embedding.weight)

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        rows = (None if t is None else t[flat] for t in (self.weight_q, self.scales, self.zeros))
        weight, scales, zeros = rows
        assert weight is not None
        found = dequantized(weight, scales, zeros, self.scheme.group_size, self.inputs, torch.float32)
        return found.to(self.dtype).view(*ids.shape, self.inputs)


def weights_of(module: nn.Module) -> int:
    """How many weights a linear map has, quantised or not; 0 for any other module."""
    if isinstance(module, QuantizedLinear):
        return module.inputs * module.outputs
    return module.weight.numel() if isinstance(module, nn.Linear) else 0
