"""The selective scan in the native CPU library: what it can run, and its forward pass (``cpu.cpp``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.double_backward import twice_differentiable
from ssmkernels.core.library import operator_or_plain, wants_graph
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import gradient_wanted, precision
from ssmkernels.native import missing
from ssmkernels.ops.selective_scan.again import again
from ssmkernels.ops.selective_scan.cpu_arguments import chunk_length, kernel, numbers, values
from ssmkernels.ops.selective_scan.cpu_backward import scan_backward
from ssmkernels.ops.selective_scan.cpu_step import selective_scan_step

__all__ = ["missing", "selective_scan", "selective_scan_step", "step_unsupported", "unsupported"]


def unsupported(arguments: Mapping[str, Any]) -> str | None:
    u, A = arguments["u"], arguments["A"]
    if u.device.type != "cpu":
        return f"its tensors must be on the CPU; `u` is on {u.device}"
    if A.numel() == 0:
        return "no channels or no states"
    return None


def step_unsupported(arguments: Mapping[str, Any]) -> str | None:
    return gradient_wanted(arguments) or unsupported(arguments)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    graph = wants_graph(u, delta, A, B, C, D, z, delta_bias, initial_state)
    run = operator_or_plain(scan, _scan, graph)
    y, final_state, _ = run(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, graph)
    return y, final_state


selective_scan.compiles = True  # type: ignore[attr-defined]  # it is an operator already


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b l d), the final state (s d n) and, where they are to be saved, the chunks' first states.

    These are (chunks n d), or (chunks 2n d) where states are complex: real and imaginary parts in turn.
    """
    y, final_state, starts = _outputs(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, save
    )
    large_pages(y, starts)
    fields, _kept = values(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, starts if save else None
    )
    fields |= {"y": y.data_ptr(), "final_state": final_state.data_ptr()}
    native.run(kernel(A), fields)
    return y, final_state, starts


scan = torch.library.custom_op("ssmkernels::selective_scan_cpu", _scan, mutates_args=())


@scan.register_fake
def _outputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, save):
    s = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunk = chunk_length(A)
    # Packed, sequence i's chunks start at number cu_seqlens[i] // chunk + i: some are nobody's
    chunks = s * -(-u.shape[1] // chunk) if cu_seqlens is None else u.shape[1] // chunk + s
    starts = u.new_zeros if save and cu_seqlens is not None else u.new_empty
    n = A.shape[1] * (2 if A.is_complex() else 1)
    return (
        u.new_empty(u.shape),
        u.new_empty((s, *A.shape), dtype=numbers(u, A)),
        starts((chunks if save else 0, n, A.shape[0]), dtype=precision(u)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, delta_softplus, initial_state, cu_seqlens, _ = inputs
    ctx.set_materialize_grads(False)  # zeros in place of gradients that nobody has, as large as the saved states
    ctx.delta_softplus = delta_softplus
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens, output[2])


@twice_differentiable(again)
def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, initial_state, cu_seqlens, starts = ctx.saved_tensors
    if dy is None:
        dy = tensors[0].new_zeros(tensors[0].shape)
    found = iter(scan_backward(*tensors, ctx.delta_softplus, initial_state, cu_seqlens, starts, dy, dfinal))
    gradients = [None if t is None else next(found) for t in (*tensors, initial_state)]
    return (*gradients[:-1], None, gradients[-1], None, None)


scan.register_autograd(_backward, setup_context=_setup_context)
