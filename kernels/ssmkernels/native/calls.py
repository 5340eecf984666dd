"""One token's native calls, written as the layer reads: each method adds a call and gives what its result will be.

For models that decode: what :mod:`ssmkernels.native.prepared` then runs in one go.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.native.prepared import Prepared, prepare

ROWS = 8  # sequences; from there on a matrix product of a library does better by the weights than row by row

# What `activated` knows, by its number in cpu_activate.cpp.
FUNCTIONS = {
    "identity": 0,
    "silu": 1,
    "sigmoid": 2,
    "tanh": 3,
    "relu": 4,
    "relu2": 5,
    "softplus": 6,
    "log_sigmoid": 7,
    "gelu_tanh": 8,
    "heavy_tail": 9,
    "exp": 10,
}


class NotPreparedError(Exception):
    """A call that the native library cannot make as it stands; the layers have to be called."""


class Calls:
    """Calls in their order, on tensors that lie where they will be at each token.

    Arguments are weights, states, and earlier results, or views of them; they are read when the calls are made, so a
    number that is computed from a weight has to be a call too.
    """

    def __init__(self) -> None:
        self.made: list[Prepared] = []

    def add(self, call: Prepared) -> Tensor:
        self.made.append(call)
        return call.result

    def into(self, result: Tensor) -> None:
        """Sends the last call's result into memory of the caller's."""
        self.made[-1] = self.made[-1].into(result)

    def op(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """An op with one result, or its first.

        Raises:
            NotPreparedError: another implementation than the native one would run it, or one that copies an argument.
            TypeError, ValueError: what the op itself would raise.
        """
        call = prepare(op, *args, **kwargs)
        if call is None:
            raise NotPreparedError(getattr(op, "__name__", str(op)))
        return self.add(call)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x ``(b, in)``, weight ``(out, in)``, bias ``(out)`` → ``(b, out)``, all float32 or all float64.

        Raises:
            NotPreparedError: other dtypes, more than ``ROWS`` sequences, or tensors that are not contiguous.
        """
        given = [t for t in (x, weight, bias) if t is not None]
        (batch, size), (outputs, _) = x.shape, weight.shape
        if not _all_wide(given) or not all(t.is_contiguous() for t in given) or not 0 < batch <= ROWS or not size:
            raise NotPreparedError("linear")
        y = x.new_empty(batch, outputs)
        values = {
            "x": x.data_ptr(),
            "weight": weight.data_ptr(),
            "bias": native.address(bias),
            "y": y.data_ptr(),
            "dtype": native.DTYPES[x.dtype],
            "rows": batch,
            "size": size,
            "outputs": outputs,
            "threads": native.threads(weight.numel()),
        }
        return self.add(Prepared("product", values, (x, weight, bias), y))

    def activated(
        self,
        x: Tensor,
        function: str,
        *,
        bias: Tensor | None = None,
        least: float = -math.inf,
        scale: float = 1.0,
        factor: Tensor | None = None,
    ) -> Tensor:
        """scale · max(f(x + bias), least) · factor, for x and factor ``(b, c)`` and bias ``(c)``.

        Raises:
            NotPreparedError: a function that is not in ``FUNCTIONS``, other dtypes than float32 and float64, or rows
                that are not contiguous.
        """
        given = [t for t in (x, bias, factor) if t is not None]
        if function not in FUNCTIONS or not _all_wide(given) or any(t.stride(-1) != 1 < t.shape[-1] for t in given):
            raise NotPreparedError(f"activated {function}")
        rows, count = x.shape
        y = x.new_empty(rows, count)
        values = {
            "x": x.data_ptr(),
            "bias": native.address(bias),
            "factor": native.address(factor),
            "y": y.data_ptr(),
            "dtype": native.DTYPES[x.dtype],
            "function": FUNCTIONS[function],
            "rows": rows,
            "count": count,
            "x_row": x.stride(0),
            "factor_row": 0 if factor is None else factor.stride(0),
            "threads": native.threads(8 * x.numel()),
            "least": least,
            "scale": scale,
        }
        return self.add(Prepared("activate", values, (x, bias, factor), y))


def _all_wide(tensors: list[Tensor]) -> bool:
    """Whether all have the same dtype, that of sums, on the CPU."""
    dtype = tensors[0].dtype
    return dtype in (torch.float32, torch.float64) and all(t.dtype == dtype and t.device.type == "cpu" for t in tensors)
