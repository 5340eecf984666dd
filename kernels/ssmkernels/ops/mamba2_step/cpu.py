"""One token of a Mamba-2 layer in the native CPU library (``cpu.cpp``): one call, each weight read once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.native import address, missing, plain, rows
from ssmkernels.native.prepared import Prepared, update
from ssmkernels.ops.mamba2_step.reference import groups
from ssmkernels.ops.mamba_step.cpu import TILE, refused

__all__ = ["forward", "missing", "prepared", "unsupported"]


def unsupported(a: Any) -> str | None:
    return refused(a) or ("no heads, channels or states" if 0 in a.ssm_state.shape[1:] else None)


def forward(a: Any, _: bool) -> Tensor:
    return update(prepared, a, ("conv_state", "ssm_state"))


def prepared(a: Any) -> Prepared:
    """The kernel's call; a state that is not contiguous is copied."""
    wide = a.ssm_state.dtype
    conv_state, ssm_state = a.conv_state.contiguous(), a.ssm_state.contiguous()
    x, in_proj, out_proj = rows(a.x), a.in_proj.contiguous(), a.out_proj.contiguous()
    conv_weight, dt_bias, A_log, D = [plain(t, wide) for t in (a.conv_weight, a.dt_bias, a.A_log, a.D)]
    in_bias, conv_bias, norm_weight, out_bias = [
        None if t is None else plain(t, wide) for t in (a.in_bias, a.conv_bias, a.norm_weight, a.out_bias)
    ]
    batch, heads, p, n = a.ssm_state.shape
    (outputs, m), (channels, width), inner = in_proj.shape, conv_weight.shape, out_proj.shape[1]
    y = x.new_empty(batch, m)
    threads = native.threads(in_proj.numel() + out_proj.numel())
    between = batch * (m + outputs + channels + inner)
    scratch = a.ssm_state.new_empty(between + threads * (width + 1) * TILE)
    return Prepared(
        "mamba2_step",
        {
            "conv_state": conv_state.data_ptr(),
            "ssm_state": ssm_state.data_ptr(),
            "x": x.data_ptr(),
            "in_proj": in_proj.data_ptr(),
            "in_bias": address(in_bias),
            "conv_weight": conv_weight.data_ptr(),
            "conv_bias": address(conv_bias),
            "dt_bias": dt_bias.data_ptr(),
            "A_log": A_log.data_ptr(),
            "D": D.data_ptr(),
            "norm_weight": address(norm_weight),
            "out_proj": out_proj.data_ptr(),
            "out_bias": address(out_bias),
            "y": y.data_ptr(),
            "scratch": scratch.data_ptr(),
            "dtype": native.DTYPES[x.dtype],
            "batch": batch,
            "m": m,
            "outputs": outputs,
            "mlp": inner - heads * p,
            "heads": heads,
            "p": p,
            "n": n,
            "groups": groups(a),
            "width": width,
            "skip": p if D.ndim == 2 else 1,
            "norm_groups": a.norm_groups,
            "gate_first": not a.norm_before_gate,
            "threads": threads,
            "x_batch": x.stride(0),
            "eps": a.norm_eps,
            "dt_least": a.dt_limit[0],
            "dt_most": a.dt_limit[1],
        },
        (
            conv_state,
            ssm_state,
            x,
            in_proj,
            in_bias,
            conv_weight,
            conv_bias,
            dt_bias,
            A_log,
            D,
            norm_weight,
            out_proj,
            out_bias,
        ),
        y,
        scratch,
    )
