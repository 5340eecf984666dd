"""S4's kernel in the native CPU library, by tables of powers as in ``tiled``.

The bilinear rule's diagonal plus low-rank system comes from PyTorch, with PyTorch's gradient; its powers are ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.operators import kernel
from ssmkernels.core.validate import precision
from ssmkernels.native import missing, wrong_device
from ssmkernels.ops.dplr_kernel import cpu_taps
from ssmkernels.ops.dplr_kernel.discretize import bilinear_dplr, column, functional, output

__all__ = ["TRACEABLE", "compute", "missing", "unsupported"]

TRACEABLE = True

_taps = kernel(cpu_taps.DECLARED, "cpu", cpu_taps, lambda a: cpu_taps.dplr_taps(*a))


def unsupported(a: Any) -> str | None:
    if why := wrong_device(a):
        return why
    if a.discretization != "bilinear":
        return "its matrix is diagonal plus low rank, as the bilinear rule's alone is"
    if a.P.numel() == 0:
        return "no channels, no states, or no correction"
    return None


def compute(a: Any) -> Tensor:
    single = precision(a.A, a.P, a.Q, a.B, a.C, a.dt) == torch.float32
    system = bilinear_dplr(a.A, a.P, a.Q, a.B, a.dt)
    states = (column(system.diagonal), column(system.left), functional(system.right), column(system.input))
    arguments = (*states, output(a.C, a.A).double(), max(a.length, 1), a.A.is_complex(), single)
    return _taps(cpu_taps.DECLARED.Arguments(*arguments))[:, : a.length]
