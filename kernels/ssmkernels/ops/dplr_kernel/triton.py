"""S4's own algorithm as in ``cauchy``, with its Cauchy products in Triton: no (d n frequencies) tensor, in no chunk.

All else, that is C̃, Woodbury's inverse of r rows and the inverse FFT, is PyTorch's, with PyTorch's gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.gradient import with_gradient
from ssmkernels.core.triton_support import all_registers, kernels, missing, next_power_of_2, on_device_of, wrong_device
from ssmkernels.ops.dplr_kernel import cauchy

__all__ = ["compute", "missing", "offline_cases", "unsupported"]

CHUNK = 2**22  # complex numbers of Cauchy products at a time
SPAN = 2048  # frequencies of one program in the backward pass


def unsupported(a: Any) -> str | None:
    if a.A.numel() == 0:
        return "no channels or no states"
    return wrong_device(a) or cauchy.unsupported(a)


def compute(a: Any) -> Tensor:
    held = a.A.shape[0] * (1 + a.P.shape[1]) ** 2
    return cauchy.around_the_circle(a, _sums, CHUNK // held)


def _forward(a: cauchy.Resolvents) -> Tensor:
    poles, pairs, nodes = _memory(a)
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


def _backward(a: cauchy.Resolvents, dsums: Tensor, _: set[str]) -> dict[str, Tensor]:
    poles, pairs, nodes = _memory(a)
    dsums = dsums.resolve_conj().contiguous()
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
    dpairs, derived = (x.sum(0) for x in found)  # (d k N); the latter times conj(pairs) is the poles' gradient
    return {"poles": (derived * pairs.conj()).sum(1), "pairs": dpairs}


_sums = with_gradient(_forward, _backward, cauchy.cauchy_sums)


def _memory(a: cauchy.Resolvents) -> tuple[Tensor, Tensor, Tensor]:
    """Poles, pairs and frequencies as the kernels read them."""
    s, h = a.one_less, a.half
    return a.poles.contiguous(), a.pairs.contiguous(), torch.stack([s.real, s.imag, h.real, h.imag])


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(rank: int) -> None:
        poles = torch.empty(4, 64, dtype=torch.complex128, device="meta")
        pairs = poles.new_empty((4, (1 + rank) ** 2, 64))
        z = poles.new_empty(8193)
        a = cauchy.Resolvents(poles, pairs, z, z)
        _backward(a, _forward(a), {"poles", "pairs"})

    for rank in (0, 1, 2):
        yield f"rank {rank}", functools.partial(launches, rank)
