"""S4's own algorithm as in ``cauchy``, with its Cauchy products in Triton: no (d n frequencies) tensor, in no chunk.

All else, that is C̃, Woodbury's inverse of r rows and the inverse FFT, is PyTorch's, with PyTorch's gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.double_backward import twice_differentiable
from ssmkernels.core.triton_support import all_registers, kernels, missing, next_power_of_2, on_device_of, wrong_device
from ssmkernels.ops.dplr_kernel import cauchy

__all__ = ["dplr_kernel", "missing", "offline_cases", "unsupported"]

CHUNK = 2**22  # complex numbers of Cauchy products at a time
SPAN = 2048  # frequencies of one program in the backward pass


def unsupported(arguments: Mapping[str, Any]) -> str | None:
    A = arguments["A"]
    if A.numel() == 0:
        return "no channels or no states"
    return wrong_device("A", A) or cauchy.unsupported(arguments)


def dplr_kernel(
    A: Tensor, P: Tensor, Q: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str
) -> Tensor:
    held = A.shape[0] * (1 + P.shape[1]) ** 2
    return cauchy.around_the_circle(A, P, Q, B, C, dt, length, discretization, _Sums.apply, CHUNK // held)


class _Sums(torch.autograd.Function):
    """Σ_n pairs_kn / (s - h poles_n), (d k f)."""

    @staticmethod
    def forward(ctx: Any, poles: Tensor, pairs: Tensor, s: Tensor, h: Tensor) -> Tensor:
        ctx.save_for_backward(poles, pairs, s, h)
        return _forward(poles.contiguous(), pairs.contiguous(), _nodes(s, h))

    @staticmethod
    @twice_differentiable(lambda ctx: (cauchy.cauchy_sums, ctx.saved_tensors))
    def backward(ctx: Any, dsums: Tensor) -> tuple[Tensor | None, ...]:
        poles, pairs, s, h = ctx.saved_tensors
        dpairs, derived = _backward(poles.contiguous(), _nodes(s, h), dsums.resolve_conj().contiguous())
        return (derived * pairs.conj()).sum(1), dpairs, None, None


def _nodes(s: Tensor, h: Tensor) -> Tensor:
    return torch.stack([s.real, s.imag, h.real, h.imag])


def _forward(poles: Tensor, pairs: Tensor, nodes: Tensor) -> Tensor:
    (d, number, states), count = pairs.shape, nodes.shape[1]
    sums = pairs.new_empty((d, number, count))
    K = min(next_power_of_2(number), 16)
    F = 1024 // K
    grid = (d, -(-count // F), -(-number // K))
    with on_device_of(poles):
        kernels(__package__).forward[grid](
            *(torch.view_as_real(x) for x in (poles, pairs)),
            nodes,
            torch.view_as_real(sums),
            states,
            number,
            count,
            K=K,
            F=F,
            num_warps=4,
            **all_registers(),
        )
    return sums


def _backward(poles: Tensor, nodes: Tensor, dsums: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the pairs, and what times their conjugates is that of the poles: both (d k N)."""
    (d, number, count), states = dsums.shape, poles.shape[1]
    K, N, F = min(next_power_of_2(number), 4), 4, 32
    spans = -(-count // SPAN)
    found = [poles.new_empty((spans, d, number, states)) for _ in range(2)]
    grid = (d, -(-states // N) * -(-number // K), spans)
    with on_device_of(poles):
        kernels(__package__).backward[grid](
            torch.view_as_real(poles),
            nodes,
            *(torch.view_as_real(x) for x in (dsums, *found)),
            states,
            number,
            count,
            SPAN,
            K=K,
            N=N,
            F=F,
            num_warps=4,
            **all_registers(),
        )
    return found[0].sum(0), found[1].sum(0)


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(rank: int) -> None:
        poles = torch.empty(4, 64, dtype=torch.complex128, device="meta")
        pairs = poles.new_empty((4, (1 + rank) ** 2, 64))
        nodes = torch.empty(4, 8193, dtype=torch.float64, device="meta")
        _backward(poles, nodes, _forward(poles, pairs, nodes))

    for rank in (0, 1, 2):
        yield f"rank {rank}", functools.partial(launches, rank)
