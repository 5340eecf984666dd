"""One token of a Mamba layer as native calls: of the whole layer, or of its parts.

``mixer`` is the layer and ``state`` its state, of the module that imports this one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import causal_conv1d_step, quantized_linear, selective_scan_step
from ssmkernels.native.calls import Calls
from ssmzoo.linear import is_plain, prepare_map
from ssmzoo.mixers._one_call import in_one_call, up_to_convolution


def step_arguments(mixer: Any, x: Tensor, state: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of :func:`ssmkernels.mamba_step`, and its options."""
    dt_proj, out_proj = mixer.dt_proj, mixer.out_proj
    arguments = (
        *up_to_convolution(mixer, x, state),
        mixer.x_proj.weight,
        dt_proj.weight,
        dt_proj.bias,
        mixer.A_log,
        mixer.D,
        out_proj.weight,
        out_proj.bias,
    )
    return arguments, {"norm_eps": mixer.bcdt_norm_eps if mixer.bcdt_norm else None}


def prepare_parts(mixer: Any, calls: Calls, x: Tensor, state: Any) -> Tensor | None:
    """A call for each part of the layer, where other modules have taken the places of its maps."""
    conv1d, dt_proj = mixer.conv1d, mixer.dt_proj
    if mixer.bcdt_norm or not in_one_call(x, conv1d):
        return None
    x, z = prepare_map(calls, mixer.in_proj, x).chunk(2, dim=-1)
    x = calls.op(causal_conv1d_step, state.conv, x, conv1d.weight.squeeze(1), conv1d.bias, "silu")
    dt, B, C = prepare_map(calls, mixer.x_proj, x).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
    if is_plain(dt_proj):
        delta, bias = calls.op(quantized_linear, dt, dt_proj.weight), dt_proj.bias
    else:
        delta, bias = prepare_map(calls, dt_proj, dt), None
    A = calls.activated(mixer.A_log, "finite_exp", scale=-1.0)
    y = calls.op(selective_scan_step, state.ssm, x, delta, A, B, C, mixer.D, z, bias, True)
    return prepare_map(calls, mixer.out_proj, y)
