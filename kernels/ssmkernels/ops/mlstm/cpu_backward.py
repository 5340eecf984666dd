"""The native matrix memory's backward pass: the state-space dual's between that of the division and the gates'.

The gradients of what the state stands for, C exp(m) and n exp(m), do not depend on m. So all that m itself gets is its
share in ε and in the final state, and decays and weights are differentiated as if it were a constant.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.native import address
from ssmkernels.ops.mlstm.cpu_arguments import core, gate_fields, gates
from ssmkernels.ops.mlstm.reference import EPSILON, scale_of
from ssmkernels.ops.ssd import cpu_backward as dual


class Incoming(NamedTuple):
    y: Tensor
    final_state: Tensor | None


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor | None]:
    g = gates(a)
    call, fields, _kept = core(a, g, saved.starts)
    dy, dm = _of_division(a, saved, grads.y, g.m)
    dC, dn = grads.final_C, grads.final_n
    dstate = None
    if dC is not None or dn is not None:
        dC = torch.zeros_like(saved.final_C) if dC is None else dC
        dn = torch.zeros_like(saved.final_n) if dn is None else dn
        dstate = torch.cat([dC.mT, dn[..., None, :]], dim=2)
    found: dict[str, Any] = dual.gradients(call, fields, Incoming(dy, dstate), scaled=True)
    dweight = found["scale"] + found["direct"]
    begun = _begun(a)
    dfinal = -begun * (_inner(saved, "final_C", dC) + _inner(saved, "final_n", dn))
    if grads.final_m is not None:
        dfinal = dfinal + grads.final_m
    di, df, dinitial = _of_gates(a, g.m, found["dt"], dweight, dm, dfinal)
    dC, dn = _of_initial(a, found["initial_state"])
    if a.initial_m is not None:
        dinitial = dinitial + begun * (_inner(a, "initial_C", dC) + _inner(a, "initial_n", dn))
    return {
        "q": found["C"].contiguous(),
        "k": found["B"].contiguous(),
        "v": found["x"][..., :-1].contiguous(),
        "i": di,
        "f": df,
        "initial_C": dC,
        "initial_n": dn,
        "initial_m": dinitial,
    }


def _of_division(a: Any, saved: Any, dy: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the sums before scaling, ``(b, l, h, v + 1)``, and of m, ``(b, l, h)``."""
    wide = precision(a.q)
    scale, sums = scale_of(a.scale, a.q), saved.sums
    floor = torch.exp(-m)
    below = torch.maximum(sums.abs(), floor) + EPSILON
    gradient = dy.new_empty((*dy.shape[:-1], dy.shape[-1] + 1), dtype=wide)
    large_pages(gradient)
    torch.mul(dy, (scale / below)[..., None], out=gradient[..., :-1])
    y = saved.exact if saved.exact.numel() else saved.y
    dbelow = -(dy * y).sum(-1) / below
    share = torch.where(sums.abs() == floor, 0.5, (sums.abs() > floor).to(wide))  # as torch.maximum's
    gradient[..., -1] = dbelow * share * sums.sign() * scale
    return gradient, dbelow * EPSILON


def _begun(a: Any) -> Tensor | float:
    """1 for sequences that have tokens, ``(s, 1)``. Of others the final m is the initial one, without rounding."""
    return float(a.q.shape[1] > 0) if a.cu_seqlens is None else (a.cu_seqlens.diff() > 0).float()[:, None]


def _inner(of: Any, name: str, gradient: Tensor | None) -> Tensor | float:
    """The sum over a head's state of its gradient times itself, ``(s, h)``."""
    state = getattr(of, name)
    return 0.0 if state is None or gradient is None else (state * gradient).flatten(2).sum(-1)


def _of_gates(
    a: Any, m: Tensor, ddecay: Tensor, dweight: Tensor, dm: Tensor, dfinal: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of i, f and the initial m."""
    fields, _kept = gate_fields(a)
    shape = (int(fields["sequences"]), a.i.shape[2])
    final = m.new_zeros(shape) + dfinal
    di, df = (m.new_empty(m.shape) for _ in range(2))
    dinitial = m.new_empty(shape)
    tensors = {
        "m": m,
        "ddecay": ddecay,
        "dweight": dweight,
        "dm": dm.contiguous(),
        "dfinal": final,
        "di": di,
        "df": df,
        "dinitial": dinitial,
    }
    native.run("mlstm_gates_backward", fields | {name: address(t) for name, t in tensors.items()})
    return di, df, dinitial


def _of_initial(a: Any, dstate: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if dstate is None:
        return None, None
    return (
        None if a.initial_C is None else dstate[:, :, :-1].mT.clone(memory_format=torch.contiguous_format),
        None if a.initial_n is None else dstate[:, :, -1].clone(),
    )
