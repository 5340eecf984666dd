"""One token of a Mamba-3 layer as native calls.

``mixer`` is the layer and ``state`` its state, of the module that imports this one.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ssmkernels import mamba3_scan_step, rms_norm
from ssmkernels.native.calls import Calls
from ssmzoo.linear import prepare_map


def prepare_token(mixer: Any, calls: Calls, x: Tensor, state: Any) -> Tensor:
    """The layer's calls, x ``(b, d_model)`` → ``(b, d_model)``."""
    z, x, B, C, dt, A, trap, angles = prepare_map(calls, mixer.in_proj, x).split(mixer.splits, dim=-1)
    dt = calls.activated(dt, "softplus", bias=mixer.dt_bias)
    A = calls.activated(A, mixer.A_activation, least=mixer.A_floor, scale=-1.0)
    trap, angles = calls.activated(trap, "sigmoid"), calls.activated(angles, "tanh", scale=math.pi)
    maps = (mixer.mimo_rank, mixer.ngroups, mixer.d_state)
    if mixer.is_mimo:
        B, C = calls.activated(B), calls.activated(C)  # the norm reads rows at one distance
    B, C = (
        calls.op(rms_norm, t.unflatten(-1, maps), norm.weight, eps=norm.eps)
        for t, norm in ((B, mixer.B_norm), (C, mixer.C_norm))
    )
    x, z = (_inputs(mixer, calls, t, weight) for t, weight in ((x, "mimo_x"), (z, "mimo_z")))  # (b r h p)
    norm = mixer.norm
    y = calls.op(
        mamba3_scan_step,
        state.ssm,
        state.angle,
        state.key,
        state.value,
        x,
        dt,
        A,
        B,
        C,
        trap,
        angles,
        mixer.B_bias,
        mixer.C_bias,
        mixer.D,
        z if norm is None else None,
        interleaved=not mixer.is_mimo,
    )
    if norm is not None:
        gate = {"gate": z.flatten(2), "norm_before_gate": norm.norm_before_gate}
        y = calls.op(rms_norm, y.flatten(2), norm.weight, eps=norm.eps, group_size=norm.group_size, **gate)
    return prepare_map(calls, mixer.out_proj, _outputs(mixer, calls, y))


def _inputs(mixer: Any, calls: Calls, x: Tensor, weight: str) -> Tensor:
    """(b, h p) → (b, r, h, p): several inputs of a step are x times the weight's rows."""
    heads = (mixer.n_heads, mixer.headdim)
    if not mixer.is_mimo:
        return x.unflatten(-1, (1, *heads))
    y = x.new_empty(x.shape[0], mixer.mimo_rank, *heads)
    for sequence, row in enumerate(x):
        for i, factor in enumerate(getattr(mixer, weight).unbind(1)):
            calls.activated(row.view(heads), factor=factor)
            calls.into(y[sequence, i])
    return y


def _outputs(mixer: Any, calls: Calls, y: Tensor) -> Tensor:
    """The recurrence's outputs, r of each sequence, → (b, h p): their sum, weighted."""
    if not mixer.is_mimo:
        return y.flatten(1)
    heads = (mixer.n_heads, mixer.headdim)
    result = y.new_empty(y.shape[0], *heads)
    for sequence, rows in enumerate(y):
        total = None
        for row, factor in zip(rows, mixer.mimo_o.unbind(1), strict=True):
            total = calls.activated(row.view(heads), factor=factor, addend=total)
        calls.into(result[sequence])
    return result.flatten(1)
