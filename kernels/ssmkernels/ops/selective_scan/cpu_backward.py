"""The native selective scan's backward pass (``cpu_backward.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.native import address, rows
from ssmkernels.ops.selective_scan.cpu_arguments import kernel, numbers, reals, values


@torch.library.custom_op("ssmkernels::selective_scan_cpu_backward", mutates_args=())
def scan_backward(
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
    starts: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
) -> list[Tensor]:
    """Gradients of u, delta, A, B, C, then of those of D, z, delta_bias and the initial state that are given.

    The kernel's gradients of complex numbers are Wirtinger's d/dx; PyTorch's are their conjugates.
    """
    wide, dtype = precision(u), numbers(u, A)
    fields, _kept = values(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, starts)
    dy = rows(dy)
    dfinal = None if dfinal is None else reals(dfinal.resolve_conj().conj_physical()).contiguous()

    def empty(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.new_empty(x.shape)

    def zeros(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if x is None else x.new_zeros(x.shape, dtype=dtype)

    dC = C.new_zeros(C.shape, dtype=dtype)
    gradients = {
        "du": empty(u),
        "ddelta": empty(delta),
        "dA": zeros(A, dtype),
        "dB": zeros(B, dtype),
        "dC": dC,
        "dD": zeros(D, wide),
        "dz": empty(z),
        "ddelta_bias": zeros(delta_bias, wide),
        "dinitial": empty(initial_state),
    }
    large_pages(gradients["du"], gradients["ddelta"], gradients["dz"])
    fields |= {name: address(g) for name, g in gradients.items()}
    fields |= {"y": 0, "final_state": 0, "dy": dy.data_ptr(), "dfinal": address(dfinal)}
    fields["dy_batch"], fields["dy_time"] = dy.stride()[:2]
    native.run(kernel(A, "_backward"), fields)
    if dtype.is_complex:
        dC *= 2  # as in maps
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    pairs = zip(gradients.values(), inputs, strict=True)
    return [_gradient(g, x) for g, x in pairs if g is not None and x is not None]


def _gradient(g: Tensor, x: Tensor) -> Tensor:
    """x's gradient in x's dtype."""
    if not g.is_complex():
        return g.to(x.dtype)
    return g.conj_physical_() if x.is_complex() else g.real.to(x.dtype).contiguous()


@scan_backward.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, starts, dy, dfinal):
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return [x.new_empty(x.shape) for x in inputs if x is not None]
