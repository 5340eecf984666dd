"""Products with a weight matrix, by the fastest that there is on the CPU for their size."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.double_backward import twice_differentiable
from ssmkernels.core.memory import large_pages
from ssmkernels.core.plain import why_not_plain
from ssmkernels.native import eager

LARGE = 2**19  # weights from which a longer way to a call is worth it
WORK = 2**23  # multiply-adds from which it is, too
WORK_WITH_GRADIENTS = 2**26  # likewise where autograd has to be told
NARROW = 256  # columns up to which numbers in half precision are converted anew for each block of them (cpu_matmul.cpp)

# Instruction sets for which the native product of several rows is no slower than PyTorch's libraries, as measured.
MATMUL = frozenset({"avx2", "avxvnni"})
# And those for which the one in half precision is, where the CPU has no products of pairs.
MATMUL_IN_HALF = MATMUL | {"avx512", "avx512vnni"}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x ``(..., in)``, weight ``(out, in)``, bias ``(out)`` → ``(..., out)``, as PyTorch's.

    PyTorch sends float32 products to whichever BLAS it was built with, whose threads wait for one another. Large
    float32 products on a CPU go to the native library, whose threads a busy machine does not hold up: those of one
    row, or of a token of each of at most :data:`ssmkernels.native.FEW` sequences ``(b, 1, in)``, on all instruction
    sets, and those of several rows, with their gradients, on the sets in :data:`MATMUL`. Either way gives a row the
    same bits whatever the other rows are, so a sequence is read and continued as it would be alone. On other sets
    products without gradients go to oneDNN, unless ``torch.backends.mkldnn.enabled = False``.
    """
    if _large(x, weight) and _plain(x, weight, bias):
        rows = x.numel() // x.shape[-1]
        decoding = rows == 1 or (x.ndim > 2 and x.shape[-2] == 1 and rows <= native.FEW)
        if not eager.wants_gradient(x, weight, bias):
            if _native(weight):
                if decoding:
                    return _few_rows(x, weight, bias)
                if native.library().isa in MATMUL:
                    return of_rows(x, weight, bias)
            if torch.backends.mkldnn.enabled and _available():
                bias = None if bias is None else bias.contiguous()  # which oneDNN takes it to be, whatever it is
                return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        elif (
            rows > 1
            and x.numel() * weight.shape[0] >= WORK_WITH_GRADIENTS
            and _native(weight)
            and native.library().isa in MATMUL
        ):
            return _Linear.apply(x, weight, bias, False)
    return F.linear(x, weight, bias)


def among_others(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`linear` in a step of training whose other products and operations are PyTorch's.

    PyTorch's threads spin on for milliseconds after each of its operations. Large float32 products with gradients take
    these threads as its own would, on all instruction sets: with those of the library each core would have two.
    """
    if not eager.wants_gradient(x, weight, bias):
        return linear(x, weight, bias)
    if (
        _large(x, weight)
        and x.numel() > x.shape[-1]
        and x.numel() * weight.shape[0] >= WORK_WITH_GRADIENTS
        and _plain(x, weight, bias)
        and _native(weight)
    ):
        return _Linear.apply(x, weight, bias, True)
    return F.linear(x, weight, bias)


def in_half(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """:func:`linear` of several rows in half precision with sums in float32, without gradients.

    By the native library, which converts numbers as it copies them, on the sets in :data:`MATMUL_IN_HALF`; on those
    that are not in :data:`MATMUL` by oneDNN where the CPU multiplies pairs of bfloat16 by itself. A row has the same
    bits whatever the other rows are.

    Args:
        x: ``(..., in)``, bfloat16 or float16.
        weight: ``(out, in)``, of x's dtype.
        bias: ``(out)``, float32.

    Returns:
        ``(..., out)``, or None where neither is faster than float32's products.
    """
    isa = native.library().isa
    if isa not in MATMUL and x.dtype == torch.bfloat16 and bias is None and torch.backends.mkldnn.enabled and _pairs():
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), None, "none", [], "")
    return of_rows(x, weight.contiguous(), bias) if isa in MATMUL_IN_HALF else None


@functools.cache
def _pairs() -> bool:
    """Whether the CPU has products of pairs of bfloat16, and oneDNN uses them."""
    found = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    if not _available() or not any(supported is not None and supported() for supported in found):
        return False
    some = torch.zeros(32, 32, dtype=torch.bfloat16)
    try:
        torch.ops.mkldnn._linear_pointwise(some, some, None, "none", [], "")
    except RuntimeError:  # it was told to do without them
        return False
    return True


def _large(x: Tensor, weight: Tensor) -> bool:
    return (
        (weight.numel() >= LARGE or x.numel() * weight.shape[0] >= WORK)
        and x.numel() > 0
        and x.ndim > 0
        and weight.ndim == 2
        and eager.float32(x, weight)
        and x.shape[-1] == weight.shape[1]  # or else PyTorch has the clearer error
    )


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether PyTorch's own product has nothing to add: derivatives that are carried forward, traces, odd biases.

    oneDNN's product knows none of these either, and is silent about them.
    """
    return (bias is None or (bias.shape == weight.shape[:1] and eager.float32(bias))) and not why_not_plain(
        {"x": x, "weight": weight, "bias": bias}
    )


def _native(weight: Tensor) -> bool:
    """Whether the native library may do it."""
    return weight.is_contiguous() and native.missing() is None


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    outputs, size = weight.shape
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    native.run(
        "product",
        {
            "x": x.data_ptr(),
            "weight": weight.data_ptr(),
            "bias": native.address(bias),
            "y": y.data_ptr(),
            "dtype": native.DTYPES[x.dtype],
            "rows": x.numel() // size,
            "size": size,
            "outputs": outputs,
            "threads": native.threads(weight.numel()),
        },
    )
    return y


def of_rows(x: Tensor, weight: Tensor, bias: Tensor | None, among: bool = False) -> Tensor:
    """:func:`linear` by the native library, of several rows.

    Args:
        x: ``(..., in)``, float32, bfloat16 or float16; what is no float32 becomes so as it is read.
        weight: ``(out, in)``, contiguous, of x's dtype.
        bias: ``(out)``, float32.
        among: whether PyTorch's own operations come before and after: :func:`among_others`.
    """
    outputs, size = weight.shape
    y = x.new_empty(*x.shape[:-1], outputs)
    x = native.rows(x).reshape(-1, size)  # a part of each row, as of what several maps take theirs from, as it lies
    bias = None if bias is None else bias.contiguous()
    _matmul(x, x.stride(), weight, (1, size), bias, y, len(x), outputs, size, among)
    return y


def matmul(a: Tensor, b: Tensor, among: bool = False) -> Tensor:
    """``a @ b`` by the native library: a ``(m, k)``, b ``(k, n)``, float32 with any strides."""
    (rows, inner), columns = a.shape, b.shape[1]
    c = a.new_empty(rows, columns)
    _matmul(a, a.stride(), b, b.stride(), None, c, rows, columns, inner, among)
    return c


def _matmul(
    a: Tensor,
    a_strides: tuple[int, ...],
    b: Tensor,
    b_strides: tuple[int, ...],
    bias: Tensor | None,
    c: Tensor,
    rows: int,
    columns: int,
    inner: int,
    among: bool,
) -> None:
    half = c.dtype != torch.float32 and columns > NARROW
    wide = c.new_empty(rows, inner, dtype=torch.float32) if half else None
    large_pages(c, wide)
    handle = native.library().handle
    if among and handle is not None:
        handle.ssmzoo_openmp_spins()
    native.run(
        "matmul",
        {
            "a": a.data_ptr(),
            "b": b.data_ptr(),
            "bias": native.address(bias),
            "c": c.data_ptr(),
            "wide": native.address(wide),
            "dtype": native.DTYPES[c.dtype],
            "rows": rows,
            "columns": columns,
            "inner": inner,
            "a_row": a_strides[0],
            "a_column": a_strides[1],
            "b_row": b_strides[0],
            "b_column": b_strides[1],
            "threads": native.threads(rows * columns * inner),
        },
    )


class _Linear(torch.autograd.Function):
    """The product of several rows, and those of its gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, among: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.among = among
        return of_rows(x, weight, bias, among)

    @staticmethod
    @twice_differentiable(lambda ctx: (F.linear, ctx.saved_tensors))
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        rows, inputs = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        ours = functools.partial(matmul, among=ctx.among)
        product = ours if eager.float32(rows, inputs, weight) else torch.matmul
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        return (
            product(rows, weight).view(x.shape) if of_x else None,
            product(rows.t(), inputs) if of_weight else None,
            rows.sum(0) if of_bias else None,
            None,
        )


@functools.cache
def _available() -> bool:
    """Whether this PyTorch has oneDNN, with the product that its own compiler uses."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
