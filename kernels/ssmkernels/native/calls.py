"""One token's native calls, written as the layer reads: each method adds a call and gives what its result will be.

For models that decode: what :mod:`ssmkernels.native.prepared` then runs in one go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.validate import HALF, REAL, precision
from ssmkernels.native.prepared import Prepared, prepare_with
from ssmkernels.native.rotary import placing, turns

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
    "finite_exp": 10,
}

SUMS = (torch.float32, torch.float64)


class NotPreparedError(Exception):
    """A call that the native library cannot make as it stands; the layers have to be called."""


class Renewed(Protocol):
    """Arguments that are others at each token.

    Attributes:
        fields: number of the call, and name of the argument.
    """

    fields: Sequence[tuple[int, str]]

    def before(self, state: Any) -> Sequence[int]:
        """Their values for a token that is about to be taken, of which a layer's state learns here."""

    def after(self, state: Any) -> None:
        """What is left to do once it has been."""


class Calls:
    """Calls in their order, on tensors that lie where they will be at each token.

    Arguments are weights, states, and earlier results, or views of them; they are read when the calls are made, so a
    number that is computed from a weight has to be a call too. What else differs from token to token is ``renewed``.

    Kernels go by addresses, so that shapes are checked here: what does not fit is for the layers to say.
    """

    def __init__(self) -> None:
        self.made: list[Prepared] = []
        self.renewed: list[Renewed] = []

    def add(self, call: Prepared) -> Tensor:
        self.made.append(call)
        return call.result

    def into(self, result: Tensor) -> None:
        """Sends the last call's result into memory of the caller's.

        Raises:
            NotPreparedError: it has another shape or dtype.
        """
        made = self.made[-1].result
        if (made.shape, made.dtype) != (result.shape, result.dtype):
            raise NotPreparedError("into")
        self.made[-1] = self.made[-1].into(result)

    def op(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """An op with one result, or its first; half-precision parameters become float32 if its kernel reads that.

        Raises:
            NotPreparedError: another implementation than the native one would run it, or one that copies an argument,
                or the op would refuse the call, as layers need not that compute the same in another way.
        """
        name = getattr(op, "__name__", str(op))
        try:
            call = prepare_with(self.widened, op, *args, **kwargs)
        except (TypeError, ValueError) as error:
            raise NotPreparedError(name) from error
        if call is None:
            raise NotPreparedError(name)
        return self.add(call)

    def widened(self, x: Tensor) -> Tensor:
        """x in float32.

        Raises:
            NotPreparedError: x is not in half precision, or not contiguous.
        """
        if x.dtype not in HALF or not x.is_contiguous():
            raise NotPreparedError("widened")
        y = x.new_empty(x.shape, dtype=torch.float32)
        values = {"x": x.data_ptr(), "y": y.data_ptr(), "dtype": native.DTYPES[x.dtype], "count": x.numel()}
        return self.add(Prepared("widen", values, (x,), y))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x ``(b, in)``, weight ``(out, in)``, bias ``(out)`` → ``(b, out)``, all float32 or all float64.

        Raises:
            NotPreparedError: other shapes or dtypes, more than ``native.FEW`` sequences, or tensors that are not
                contiguous.
        """
        given = [t for t in (x, weight, bias) if t is not None]
        (batch, size), outputs = x.shape, len(weight)
        if (
            not _alike(given, SUMS)
            or weight.shape != (outputs, size)
            or (bias is not None and bias.shape != (outputs,))
            or not all(t.is_contiguous() for t in given)
            or not 0 < batch <= native.FEW
            or not size
        ):
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
        function: str = "identity",
        *,
        bias: Tensor | None = None,
        slope: float = 1.0,
        least: float = -math.inf,
        scale: float = 1.0,
        factor: Tensor | None = None,
        addend: Tensor | None = None,
    ) -> Tensor:
        """scale · max(f(slope (x + bias)), least) · factor + addend, for x and addend ``(b, c)``.

        bias is ``(c)`` or ``(r, c)``, and factor ``(r, c)`` or ``(r, 1)``, where r divides b: row i of x meets their
        row i mod r.

        Raises:
            NotPreparedError: a function that is not in ``FUNCTIONS``, other shapes, several dtypes, or rows that are
                not contiguous.
        """
        given = [t for t in (x, bias, factor, addend) if t is not None]
        if not (_met(x, bias) and _met(x, factor, one=True) and (addend is None or addend.shape == x.shape)):
            raise NotPreparedError(f"activated {function}")
        if function not in FUNCTIONS or not _alike(given, REAL) or any(t.stride(-1) != 1 < t.shape[-1] for t in given):
            raise NotPreparedError(f"activated {function}")
        y = x.new_empty(x.shape)
        rows, count = x.shape
        if bias is None and all(t.is_contiguous() and t.shape == x.shape for t in given):
            rows, count = 1, x.numel()  # short rows would be tasks that take as long to claim as to do
        values = {
            "x": x.data_ptr(),
            "bias": native.address(bias),
            "factor": native.address(factor),
            "addend": native.address(addend),
            "y": y.data_ptr(),
            "dtype": native.DTYPES[x.dtype],
            "function": FUNCTIONS[function],
            "rows": rows,
            "count": count,
            "x_row": x.stride(0),
            "addend_row": 0 if addend is None else addend.stride(0),
            "factor_step": 0 if factor is None or factor.shape[1] == 1 < x.shape[1] else 1,
            "threads": native.threads(8 * x.numel()),
            "slope": slope,
            "least": least,
            "scale": scale,
        }
        for name, t in (("bias", bias if bias is None or bias.ndim == 2 else bias[None]), ("factor", factor)):
            values |= {f"{name}_rows": 1 if t is None else t.shape[0], f"{name}_row": 0 if t is None else t.stride(0)}
        return self.add(Prepared("activate", values, (x, bias, factor, addend), y))

    def head_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None = None, *, eps: float, centred: bool = False
    ) -> Tensor:
        """(x - mean) / √(variance + eps) · weight + bias within each head: x ``(b, h, p)`` → ``(b, h p)``.

        weight and bias are ``(h p)``; with ``centred`` the factor is 1 + weight.

        Raises:
            NotPreparedError: other shapes, several dtypes, or tensors that are not contiguous.
        """
        self._check_heads("head_norm", x, weight, bias)
        (rows, heads, p), y = x.shape, x.new_empty(x.shape[0], x.shape[1] * x.shape[2])
        values = {
            "x": x.data_ptr(),
            "weight": native.address(weight),
            "bias": native.address(bias),
            "y": y.data_ptr(),
            "dtype": native.DTYPES[x.dtype],
            "rows": rows,
            "heads": heads,
            "p": p,
            "centred": centred,
            "threads": native.threads(8 * x.numel()),
            "eps": eps,
        }
        return self.add(Prepared("head_norm", values, (x, weight, bias), y))

    def head_sum(self, x: Tensor, weight: Tensor) -> Tensor:
        """Σ x · weight over each head's channels: x ``(b, h, p)``, weight ``(h, p)`` → ``(b, h)``.

        Raises:
            NotPreparedError: other shapes, several dtypes, or tensors that are not contiguous.
        """
        self._check_heads("head_sum", x, weight)
        (rows, heads, p), y = x.shape, x.new_empty(x.shape[:2])
        values = {"x": x.data_ptr(), "weight": weight.data_ptr(), "y": y.data_ptr(), "dtype": native.DTYPES[x.dtype]}
        return self.add(Prepared("head_sum", values | {"rows": rows, "heads": heads, "p": p}, (x, weight), y))

    def rotary(self, x: Tensor, positions: Tensor, frequency: Tensor) -> Tensor:
        """Turns channels i and i + r of each head of x ``(b, h, k)`` by the angle positions · frequency_i.

        positions is int32 ``(b)``, at least 0, and frequency ``(r)`` in the precision of sums. Channels from 2 r on
        stay.

        Raises:
            NotPreparedError: other shapes or dtypes, or tensors that are not contiguous.
        """
        if positions.shape != x.shape[:1] or not turns(x, frequency):
            raise NotPreparedError("rotary")
        given = (x.flatten(1), positions, frequency)
        dtypes = positions.dtype == torch.int32 and frequency.dtype == precision(x) and _alike([x], REAL)
        if not dtypes or any(t.stride(-1) != 1 < t.shape[-1] for t in given) or given[0].data_ptr() != x.data_ptr():
            raise NotPreparedError("rotary")
        y = x.new_empty(x.shape)
        values = placing(x, frequency) | {"positions": positions.data_ptr(), "y": y.data_ptr()}
        return self.add(Prepared("rotary", values, (x, positions, frequency), y))

    def count(self, counts: Tensor) -> Tensor:
        """Adds 1 to contiguous int32 ``(b)`` in place.

        Raises:
            NotPreparedError: another dtype, or not contiguous.
        """
        if counts.dtype != torch.int32 or counts.device.type != "cpu" or not counts.is_contiguous():
            raise NotPreparedError("count")
        values = {"counts": counts.data_ptr(), "rows": counts.shape[0]}
        return self.add(Prepared("count", values, (counts,), counts, output="counts"))

    def _check_heads(self, name: str, x: Tensor, *weights: Tensor | None) -> None:
        """x ``(b, h, p)``, and weights of as many numbers as a row of it has."""
        given = [t for t in (x, *weights) if t is not None]
        fit = all(len(x) * t.numel() == x.numel() for t in given[1:])
        if not fit or not _alike(given, REAL) or not all(t.is_contiguous() for t in given):
            raise NotPreparedError(name)


def _met(x: Tensor, other: Tensor | None, one: bool = False) -> bool:
    """Whether rows of x ``(b, c)`` meet those of the other, ``(c)`` or ``(r, c)``, or with ``one`` ``(r, 1)``."""
    if other is None:
        return True
    channels = other.shape[-1] == x.shape[1] or (one and other.shape[-1] == 1)
    rows = other.ndim == 2 and len(other) > 0 and len(x) % len(other) == 0
    return channels and (rows or (other.ndim == 1 and not one))


def _alike(tensors: list[Tensor], dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether all have the same dtype, one of these, on the CPU."""
    dtype = tensors[0].dtype
    return dtype in dtypes and all(t.dtype == dtype and t.device.type == "cpu" for t in tensors)
