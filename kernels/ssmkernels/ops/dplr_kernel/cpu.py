"""S4's kernel in the native CPU library (``cpu.cpp``, ``cpu_backward.cpp``), by tables of powers as in ``tiled``.

The bilinear rule's diagonal plus low-rank system comes from PyTorch, with PyTorch's gradient; its powers are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.double_backward import twice_differentiable
from ssmkernels.core.validate import precision
from ssmkernels.native import missing
from ssmkernels.ops.dplr_kernel.discretize import bilinear_dplr, column, functional, output

__all__ = ["dplr_kernel", "missing", "unsupported"]


def unsupported(arguments: Mapping[str, Any]) -> str | None:
    A, P = arguments["A"], arguments["P"]
    if A.device.type != "cpu":
        return f"its tensors must be on the CPU; `A` is on {A.device}"
    if arguments["discretization"] != "bilinear":
        return "its matrix is diagonal plus low rank, as the bilinear rule's alone is"
    if P.numel() == 0:
        return "no channels, no states, or no correction"
    return None


def dplr_kernel(
    A: Tensor, P: Tensor, Q: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str
) -> Tensor:
    single = precision(A, P, Q, B, C, dt) == torch.float32
    system = bilinear_dplr(A, P, Q, B, dt)
    states = (column(system.diagonal), column(system.left), functional(system.right), column(system.input))
    tensors = (*states, output(C, A).double())
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    run = taps if graph or torch.compiler.is_compiling() else _taps
    return run(*tensors, max(length, 1), A.is_complex(), single)[:, :length]


dplr_kernel.compiles = True  # type: ignore[attr-defined]  # it is an operator already


def _taps(
    diagonal: Tensor, left: Tensor, right: Tensor, B: Tensor, C: Tensor, length: int, pairs: bool, single: bool
) -> Tensor:
    """C Ā^t B̄ for t < length, where Ā = D - Σ_r left_r right_r, in real numbers: float64 (d N), (d r N).

    With ``pairs`` N = 2n, and D is of n blocks [Re -Im; Im Re] of ``diagonal`` = [Re, Im]; otherwise it is that itself.
    Returns float32 if ``single``.
    """
    K = _outputs(diagonal, left, right, B, C, length, pairs, single)
    values, _kept = _values(diagonal, left, right, B, C, length, pairs, single)
    native.run("dplr_kernel", values | {"K": K.data_ptr()})
    return K


taps = torch.library.custom_op("ssmkernels::dplr_kernel_cpu", _taps, mutates_args=())


@taps.register_fake
def _outputs(diagonal, left, right, B, C, length, pairs, single):
    return diagonal.new_empty((diagonal.shape[0], length), dtype=torch.float32 if single else torch.float64)


def _values(diagonal, left, right, B, C, length, pairs, single) -> tuple[dict[str, int], list[Tensor]]:
    """The kernel's arguments but for the output, and the tensors that they point into."""
    tensors = {"diagonal": diagonal, "left": left, "right": right, "B": B, "C": C}
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    values = {name: t.data_ptr() for name, t in tensors.items()}
    d, rank, N = left.shape
    sizes = {"d": d, "n": N // 2 if pairs else N, "rank": rank, "length": length, "pairs": pairs, "single": single}
    return values | sizes | {"threads": native.threads(d * N * length)}, list(tensors.values())


@torch.library.custom_op("ssmkernels::dplr_kernel_cpu_backward", mutates_args=())
def taps_backward(
    diagonal: Tensor,
    left: Tensor,
    right: Tensor,
    B: Tensor,
    C: Tensor,
    length: int,
    pairs: bool,
    single: bool,
    dK: Tensor,
) -> list[Tensor]:
    """Gradients of the five tensors."""
    values, _kept = _values(diagonal, left, right, B, C, length, pairs, single)
    dK = dK.contiguous()
    gradients = {
        "d" + name: x.new_empty(x.shape)
        for name, x in (("diagonal", diagonal), ("left", left), ("right", right), ("B", B), ("C", C))
    }
    addresses = {name: g.data_ptr() for name, g in gradients.items()}
    native.run("dplr_kernel_backward", values | addresses | {"K": 0, "dK": dK.data_ptr()})
    return list(gradients.values())


@taps_backward.register_fake
def _(diagonal, left, right, B, C, length, pairs, single, dK):
    return [x.new_empty(x.shape) for x in (diagonal, left, right, B, C)]


def _powers(
    diagonal: Tensor, left: Tensor, right: Tensor, B: Tensor, C: Tensor, length: int, pairs: bool, single: bool
) -> Tensor:
    """:func:`_taps` in PyTorch, one power after another."""
    h, found = B, []
    re, im = diagonal.chunk(2, dim=1) if pairs else (diagonal, None)
    for _ in range(length):
        found.append((C * h).sum(-1))
        corrections = torch.einsum("drn,drm,dm->dn", left, right, h)
        if im is None:
            turned = re * h
        else:
            x, y = h.chunk(2, dim=1)
            turned = torch.cat([re * x - im * y, im * x + re * y], dim=1)
        h = turned - corrections
    return torch.stack(found, dim=1).to(torch.float32 if single else torch.float64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.length, ctx.pairs, ctx.single = inputs
    ctx.save_for_backward(*tensors)


@twice_differentiable(lambda ctx: (_powers, (*ctx.saved_tensors, ctx.length, ctx.pairs, ctx.single)))
def _backward(ctx: Any, dK: Tensor) -> tuple[Tensor | None, ...]:
    found = taps_backward(*ctx.saved_tensors, ctx.length, ctx.pairs, ctx.single, dK)
    return (*found, None, None, None)


taps.register_autograd(_backward, setup_context=_setup_context)
