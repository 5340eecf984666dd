"""The long convolution in Triton, for circles that fit one multiprocessor: launches, and their place in PyTorch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.library import operator_or_plain, wants_graph
from ssmkernels.triton_support import all_registers, kernels, missing, next_power_of_2, on_device_of, wrong_device

__all__ = ["fft_conv", "missing", "offline_cases", "unsupported"]

SMALLEST, LARGEST = 256, 4096  # complex points of a circle, each for two real ones
PROGRAMS = 512  # that share sums over sequences


def unsupported(arguments: Mapping[str, Any]) -> str | None:
    u, kernel, reverse = arguments["u"], arguments["kernel"], arguments["kernel_reverse"]
    if u.dtype == torch.float64:
        return "float64"
    if _points(u.shape[1], kernel, reverse) > LARGEST:
        packed = "" if arguments["cu_seqlens"] is None else ", for a packed sequence that is as long as all of them"
        return f"a circle of more than {2 * LARGEST} points{packed}"
    return wrong_device("u", u)


def fft_conv(
    u: Tensor, kernel: Tensor, D: Tensor | None, kernel_reverse: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    run = operator_or_plain(conv, _conv, wants_graph(u, kernel, D, kernel_reverse))
    return run(u, kernel, D, kernel_reverse, cu_seqlens)


fft_conv.compiles = True  # type: ignore[attr-defined]  # it is an operator already


def _points(length: int, kernel: Tensor, reverse: Tensor | None) -> int:
    """Complex points of a circle on which a sequence does not wrap around. Taps from the length-th on meet nothing."""
    after = max(min(kernel.shape[1], length) - 1, 0)
    ahead = 0 if reverse is None else min(reverse.shape[1], max(length - 1, 0))
    return max(SMALLEST, next_power_of_2(length + max(after, ahead)) // 2)


@dataclasses.dataclass(frozen=True)
class Circle:
    """Sequences that lie on circles of one size, whatever their neighbours: all of a batch, or some of a packed one.

    The kernels' spectra, too, depend on nothing but the size. All taps up to the size's half are in them: where a
    sequence is shorter than that, further ones do not come round to it, and where it is longer there are none.
    """

    points: int
    longest: int
    rows: int
    spans: Tensor | None  # int32 (rows, 2): borders of packed sequences

    @property
    def folded(self) -> bool:
        """Whether sequences take more than half of the circle."""
        return self.longest > self.points

    def options(self, warps: int = 16) -> dict[str, Any]:
        """Launch settings, with ``warps`` at most and on a multiprocessor."""
        own = min(self.points // 256, warps)
        return {"M": self.points, "num_warps": own, "num_stages": 1, **all_registers(32 * warps)}

    def sequences(self, x: Tensor) -> dict[str, Any]:
        """What kernels ask about x (b d l) and its sequences."""
        shape = {"rows": self.rows, "channels": x.shape[1], "length": x.shape[2]}
        return {"spans": self.spans, **shape, "FOLDED": self.folded}


def _circles(u: Tensor, kernel: Tensor, reverse: Tensor | None, cu_seqlens: Tensor | None) -> list[Circle]:
    """Borders of packed sequences are read on the host."""
    b, length, _ = u.shape
    if cu_seqlens is None:
        return [Circle(_points(length, kernel, reverse), length, b, None)]
    borders = cu_seqlens.tolist()
    found: dict[int, list[tuple[int, int]]] = {}
    for start, end in itertools.pairwise(borders):
        if start < end:
            found.setdefault(_points(end - start, kernel, reverse), []).append((start, end))
    return [
        Circle(
            points,
            max(end - start for start, end in spans),
            len(spans),
            torch.tensor(spans, dtype=torch.int32).to(u.device),
        )
        for points, spans in sorted(found.items())
    ]


@functools.lru_cache(maxsize=32)
def _tables(m: int, device: torch.device) -> dict[str, Tensor]:
    """Matrices and twiddles as triton_transform.py has them."""

    def roots(rows: Tensor, columns: Tensor, half_turn: int) -> Tensor:
        """exp(iπ rows columns/half_turn) as (real and imaginary, rows, columns)."""
        angle = (rows[:, None] * columns % (2 * half_turn)).double() * (math.pi / half_turn)
        return torch.stack([angle.cos(), angle.sin()])

    def halves(x: Tensor) -> Tensor:
        high = x.half()
        return torch.stack([high, (x - high.double()).half()])

    n3 = m // 256
    sixteen, third, rest = (torch.arange(n) for n in (16, n3, m // 16))
    odd = 1 - 4 * sixteen
    several = torch.kron(roots(third, -2 * third, n3), torch.eye(16 // n3, dtype=torch.float64))
    matrices = (roots(odd, sixteen, 32), roots(sixteen, -2 * sixteen, 16), several)
    twiddles = (roots(odd, rest, 2 * m), roots(-2 * sixteen, third, 16 * n3))
    return {
        "matrices": torch.stack([halves(x) for x in matrices]).to(device),
        "twiddles": torch.cat([x.flatten() for x in twiddles]).float().to(device),
    }


def _conv(
    u: Tensor, kernel: Tensor, D: Tensor | None, kernel_reverse: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    if u.numel() == 0:
        return u.new_empty(u.shape)
    circles = _circles(u, kernel, kernel_reverse, cu_seqlens)
    return _convolve(circles, u.mT.contiguous(), kernel, D, kernel_reverse, adjoint=False)


conv = torch.library.custom_op("ssmkernels::fft_conv_triton", _conv, mutates_args=())


@conv.register_fake
def _(u, kernel, D, kernel_reverse, cu_seqlens):
    return u.new_empty(u.shape)


def _conv_backward(
    u: Tensor,
    kernel: Tensor,
    D: Tensor | None,
    kernel_reverse: Tensor | None,
    cu_seqlens: Tensor | None,
    dy: Tensor,
    wants_u: bool,
    wants_weights: bool,
) -> list[Tensor]:
    """The gradient of u, if wanted; then, if wanted, of the kernel, and of D and kernel_reverse where there are."""
    if u.numel() == 0:
        weights = (kernel, D, kernel_reverse) if wants_weights else ()
        return [w.new_zeros(w.shape) for w in ((u,) if wants_u else ()) + weights if w is not None]
    circles = _circles(u, kernel, kernel_reverse, cu_seqlens)
    g = dy.mT.contiguous()
    found = [_convolve(circles, g, kernel, D, kernel_reverse, adjoint=True)] if wants_u else []
    if wants_weights:
        found += _correlate(circles, u.mT.contiguous(), g, kernel, D, kernel_reverse)
    return found


conv_backward = torch.library.custom_op("ssmkernels::fft_conv_triton_backward", _conv_backward, mutates_args=())


@conv_backward.register_fake
def _(u, kernel, D, kernel_reverse, cu_seqlens, dy, wants_u, wants_weights):
    weights = (kernel, D, kernel_reverse) if wants_weights else ()
    return [w.new_empty(w.shape) for w in ((u,) if wants_u else ()) + weights if w is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    u, kernel, D, reverse, cu_seqlens = ctx.saved_tensors
    wants_u, wants_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:4])
    found = iter(conv_backward(u, kernel, D, reverse, cu_seqlens, dy, wants_u, wants_weights))
    du = next(found) if wants_u else None
    weights = (None if w is None or not wants_weights else next(found) for w in (kernel, D, reverse))
    return (du, *weights, None)


conv.register_autograd(_backward, setup_context=_setup_context)


def _convolve(
    circles: list[Circle], x: Tensor, kernel: Tensor, D: Tensor | None, reverse: Tensor | None, adjoint: bool
) -> Tensor:
    """x (b d l) → the convolution or its adjoint, with the skip, (b l d)."""
    d = x.shape[1]
    y = torch.empty_like(x)
    D = None if D is None else D.contiguous()
    with on_device_of(x):
        for circle in circles:
            spectra = x.new_empty((d, 2, circle.points), dtype=torch.float32)
            tables, options = _tables(circle.points, x.device), circle.options()
            kernels(__package__).spectrum[(d,)](
                kernel,
                reverse,
                spectra,
                **tables,
                **_steps("kernel", kernel),
                **_steps("reverse", reverse),
                taps=min(kernel.shape[1], circle.points),
                ahead=0 if reverse is None else min(reverse.shape[1], circle.points),
                **options,
            )
            kernels(__package__).convolve[(circle.rows * d,)](
                x, spectra, D, y, **circle.sequences(x), **tables, ADJOINT=adjoint, **options
            )
    return y.mT.contiguous()


def _steps(name: str, taps: Tensor | None) -> dict[str, int]:
    """Strides of taps (d l_k) by the kernels' names."""
    return dict(zip((f"{name}_channel", f"{name}_step"), (0, 0) if taps is None else taps.stride(), strict=True))


def _correlate(
    circles: list[Circle], x: Tensor, g: Tensor, kernel: Tensor, D: Tensor | None, reverse: Tensor | None
) -> list[Tensor]:
    """x and g (b d l) → the gradients of kernel and of those of D and reverse that are given."""
    d = x.shape[1]
    found = [
        w if w is None else w.new_zeros((len(circles), *w.shape), dtype=torch.float32) for w in (kernel, D, reverse)
    ]
    for i, circle in enumerate(circles):
        dkernel, dD, dreverse = (None if w is None else w[i] for w in found)
        share = -(-circle.rows // max(1, PROGRAMS // d))
        parts = -(-circle.rows // share)
        sums = x.new_empty((parts, d, 2, circle.points), dtype=torch.float32)
        at_zero = None if dD is None else sums.new_empty((parts, d))
        tables = _tables(circle.points, x.device)
        with on_device_of(x):
            kernels(__package__).correlate[(d, parts)](
                x, g, sums, at_zero, **circle.sequences(x), **tables, share=share, **circle.options(8)
            )
            kernels(__package__).lags[(d,)](
                sums,
                dkernel,
                dreverse,
                **tables,
                channels=d,
                parts=parts,
                taps=min(kernel.shape[1], circle.longest),
                ahead=0 if reverse is None else min(reverse.shape[1], circle.longest - 1),
                kernel_channel=kernel.shape[1],
                reverse_channel=0 if reverse is None else reverse.shape[1],
                **circle.options(),
            )
        if dD is not None and at_zero is not None:
            dD.copy_(at_zero.sum(0))
    return [
        parts.sum(0).to(w.dtype)
        for w, parts in zip((kernel, D, reverse), found, strict=True)
        if w is not None and parts is not None
    ]


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(dtype: torch.dtype, length: int, taps: int, whole: bool) -> None:
        def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        x, kernel = meta(1 if whole else 2, 8, length), meta(8, taps, dtype=torch.float32)
        D, reverse = (meta(8), meta(8, taps)) if whole else (None, None)
        spans = meta(2, 2, dtype=torch.int32) if whole else None
        circles = [Circle(_points(length, kernel, reverse), length, 2, spans)]
        _convolve(circles, x, kernel, D, reverse, adjoint=whole)
        _correlate(circles, x, x, kernel, D, reverse)

    for dtype, length, taps, whole in (
        (torch.float32, 4096, 4096, True),
        (torch.bfloat16, 4096, 4096, False),
        (torch.float16, 8000, 100, True),
        (torch.float32, 1024, 1024, False),
        (torch.bfloat16, 256, 256, True),
    ):
        name = f"{str(dtype).removeprefix('torch.')}, length {length}, {taps} taps" + ", packed, both sides" * whole
        yield name, functools.partial(launches, dtype, length, taps, whole)
