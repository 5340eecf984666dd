"""One token of a Mamba-2 layer as native calls: of the whole layer, or of its parts.

``mixer`` is the layer and ``state`` its state, of the module that imports this one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import causal_conv1d_step, rms_norm, ssd_step
from ssmkernels.native.calls import Calls
from ssmzoo.linear import prepare_map
from ssmzoo.mixers._one_call import in_one_call, up_to_convolution


def step_arguments(mixer: Any, x: Tensor, state: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of :func:`ssmkernels.mamba2_step`, and its options."""
    out_proj, norm = mixer.out_proj, mixer.norm
    arguments = (
        *up_to_convolution(mixer, x, state),
        mixer.dt_bias,
        mixer.A_log,
        mixer._skip(mixer.D),
        None if norm is None else norm.weight,
        out_proj.weight,
        out_proj.bias,
    )
    return arguments, {
        "dt_limit": mixer.dt_limit,
        "norm_groups": mixer.norm_groups,
        "norm_before_gate": norm is not None and norm.norm_before_gate,
        "norm_eps": 1.0 if norm is None else norm.eps,
    }


def prepare_parts(mixer: Any, calls: Calls, x: Tensor, state: Any) -> Tensor | None:
    """A call for each part of the layer, where other modules have taken the places of its maps."""
    conv1d, norm = mixer.conv1d, mixer.norm
    if mixer.scale is not None or norm is None or mixer.splits[1] or not in_one_call(x, conv1d, norm=norm):
        return None
    _, _, z, xBC, dt = prepare_map(calls, mixer.in_proj, x).split(mixer.splits, dim=-1)
    xBC = calls.op(causal_conv1d_step, state.conv, xBC, conv1d.weight.squeeze(1), conv1d.bias, "silu")
    x, B, C = mixer._split(xBC)
    A, D = calls.activated(mixer.A_log[None], "finite_exp", scale=-1.0)[0], mixer._skip(mixer.D)
    bias, limit = mixer.dt_bias, mixer.dt_limit
    y = calls.op(ssd_step, state.ssm, x, dt, A, B, C, D, dt_bias=bias, dt_softplus=True, dt_limit=limit).flatten(1)
    gate = {"gate": z, "norm_before_gate": norm.norm_before_gate}
    y = calls.op(rms_norm, y, norm.weight, eps=norm.eps, group_size=norm.group_size, **gate)
    return prepare_map(calls, mixer.out_proj, y)
