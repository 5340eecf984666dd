"""What the functions of :mod:`ssmkernels.compat.fla.modules.convolution` do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels import causal_conv1d
from ssmkernels.compat._dtypes import beside, int32_borders
from ssmkernels.compat._fla import Found, refuse
from ssmkernels.compat.causal_conv1d import causal_conv1d_update
from ssmkernels.core.packing import spans
from ssmkernels.core.validate import check_options, check_shapes, precision


def convolve(a: Any) -> Found:
    """As :func:`ssmkernels.compat.fla.modules.convolution.causal_conv1d`."""
    shapes = {
        "x": (a.x, "b l d"),
        "weight": (a.weight, "d w"),
        "bias": (a.bias, "d"),
        "residual": (a.residual, "b l d"),
    }
    check_shapes(a.op, {**shapes, "initial_state": (a.initial_state, "s d w")}, ("x", "weight"))
    check_options(a.op, "bool", output_final_state=a.output_final_state)
    refuse(a)
    borders = None if a.cu_seqlens is None else int32_borders(a.op, a.cu_seqlens, a.x.shape[1])
    state = a.initial_state
    y: Any = causal_conv1d(
        a.x,
        beside(a.weight, a.x),
        beside(a.bias, a.x),
        _activation(a),
        initial_state=None if state is None else state[..., 1:].transpose(1, 2).to(precision(a.x)),
        cu_seqlens=borders,
        implementation=a.implementation,
    )
    y = y if a.residual is None else y + a.residual
    return y, _last_inputs(a, borders) if a.output_final_state else None


def convolve_token(a: Any) -> Found:
    """As :func:`ssmkernels.compat.fla.modules.convolution.causal_conv1d_update`."""
    shapes = {"x": (a.x, "s d | b l d"), "weight": (a.weight, "d w"), "cache": (a.cache, "s d w")}
    check_shapes(a.op, {**shapes, "residual": (a.residual, "s d | b l d")}, ("x", "weight", "cache"))
    x = a.x.reshape(-1, a.x.shape[-1])  # (s d)
    if len(x) != len(a.cache):
        raise ValueError(f"{a.op}: `x` must be one token for each of {len(a.cache)} caches; got {tuple(a.x.shape)}")
    y = causal_conv1d_update(x, a.cache, a.weight, a.bias, _activation(a)).reshape(a.x.shape)
    return y if a.residual is None else y + a.residual.reshape(y.shape), a.cache


def _last_inputs(a: Any, borders: Tensor | None) -> Tensor:
    """The last w inputs of each sequence (s d w), with the state before it where it is shorter."""
    width = a.weight.shape[1]
    sequences = list(a.x) if borders is None else [a.x[0, rows] for _, rows in spans(borders)]
    before = (
        a.x.new_zeros(len(sequences), *a.weight.shape) if a.initial_state is None else a.initial_state.to(a.x.dtype)
    )
    ends = [torch.cat([start, x.mT], dim=-1)[:, x.shape[0] :] for start, x in zip(before, sequences, strict=True)]
    return torch.stack(ends) if ends else a.x.new_empty(0, a.weight.shape[0], width)


def _activation(a: Any) -> str | None:
    if a.activation not in (None, "silu", "swish"):
        raise ValueError(f"{a.op}: `activation` must be None, 'silu' or 'swish'; got {a.activation!r}")
    return None if a.activation is None else "silu"
