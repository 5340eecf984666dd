"""The native matrix memory's backward pass: the state-space dual's between that of the division and the gates'."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ssmkernels import native
from ssmkernels.native import address
from ssmkernels.ops.mlstm.cpu_arguments import core, gate_fields
from ssmkernels.ops.mlstm.surroundings import gradients
from ssmkernels.ops.ssd import cpu_backward as dual


class Incoming(NamedTuple):
    y: Tensor  # the gradient of outputs that have been divided
    final_state: Tensor | None


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor | None]:
    def of_recurrence(dstate: Tensor | None) -> dict[str, Any]:
        call, fields, _kept = core(a, saved, saved.starts, saved.sums)
        found: dict[str, Any] = dual.gradients(call, fields, Incoming(grads.y, dstate), ("scale", "m"))
        return found | {"decay": found["dt"], "weight": found["scale"]}

    def of_gates(ddecay: Tensor, dweight: Tensor, dm: Tensor, dfinal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own, _kept = gate_fields(a)
        di, df, dinitial = (t.new_empty(t.shape) for t in (dm, dm, dfinal))
        tensors = {
            "m": saved.m,
            "ddecay": ddecay,
            "dweight": dweight,
            "dm": dm,
            "dfinal": dfinal,
            "di": di,
            "df": df,
            "dinitial": dinitial,
        }
        native.run("mlstm_gates_backward", own | {name: address(t) for name, t in tensors.items()})
        return di, df, dinitial

    return gradients(a, saved, grads, of_recurrence, of_gates)
