"""One token of a Mamba layer in the native CPU library (``cpu.cpp``): one call, each weight read once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.native import address, missing, plain, rows, wrong_device
from ssmkernels.native.prepared import Prepared, update

__all__ = ["forward", "missing", "prepared", "unsupported"]

TILE = 64  # channels: kTile in tiles.h


def unsupported(a: Any) -> str | None:
    return refused(a) or ("no channels, no states or no rank" if 0 in (*a.A_log.shape, a.dt_proj.shape[1]) else None)


def refused(a: Any) -> str | None:
    """Why the native library leaves one token of a layer to others, whatever the layer's sizes."""
    if why := wrong_device(a):
        return why
    if a.x.shape[0] > native.FEW and not torch.compiler.is_exporting():  # a program for any number has one way
        return f"more than {native.FEW} sequences, for which matrix products are faster"
    return None


def forward(a: Any, _: bool) -> Tensor:
    return update(prepared, a, ("conv_state", "ssm_state"))


def prepared(a: Any) -> Prepared:
    """The kernel's call; a state that is not contiguous is copied."""
    wide = a.ssm_state.dtype
    conv_state, ssm_state = a.conv_state.contiguous(), a.ssm_state.contiguous()
    x = rows(a.x)
    in_proj, x_proj, dt_proj, out_proj = [t.contiguous() for t in (a.in_proj, a.x_proj, a.dt_proj, a.out_proj)]
    conv_weight, dt_bias, A_log, D = [plain(t, wide) for t in (a.conv_weight, a.dt_bias, a.A_log, a.D)]
    in_bias, conv_bias, out_bias = [None if t is None else plain(t, wide) for t in (a.in_bias, a.conv_bias, a.out_bias)]
    (batch, d, n), (width, rank) = a.ssm_state.shape, (conv_weight.shape[1], dt_proj.shape[1])
    m = x.shape[1]
    y = x.new_empty(batch, m)
    threads = native.threads(in_proj.numel() + out_proj.numel())
    between = batch * (m + 4 * d + rank + 2 * n)
    scratch = a.ssm_state.new_empty(between + threads * max(width + 1, n) * TILE)
    return Prepared(
        "mamba_step",
        {
            "conv_state": conv_state.data_ptr(),
            "ssm_state": ssm_state.data_ptr(),
            "x": x.data_ptr(),
            "in_proj": in_proj.data_ptr(),
            "in_bias": address(in_bias),
            "conv_weight": conv_weight.data_ptr(),
            "conv_bias": address(conv_bias),
            "x_proj": x_proj.data_ptr(),
            "dt_proj": dt_proj.data_ptr(),
            "dt_bias": dt_bias.data_ptr(),
            "A_log": A_log.data_ptr(),
            "D": D.data_ptr(),
            "out_proj": out_proj.data_ptr(),
            "out_bias": address(out_bias),
            "y": y.data_ptr(),
            "scratch": scratch.data_ptr(),
            "dtype": native.DTYPES[x.dtype],
            "batch": batch,
            "m": m,
            "d": d,
            "n": n,
            "width": width,
            "rank": rank,
            "normalised": a.norm_eps is not None,
            "threads": threads,
            "x_batch": x.stride(0),
            "eps": a.norm_eps or 0.0,
        },
        (
            conv_state,
            ssm_state,
            x,
            in_proj,
            in_bias,
            conv_weight,
            conv_bias,
            x_proj,
            dt_proj,
            dt_bias,
            A_log,
            D,
            out_proj,
            out_bias,
        ),
        y,
        scratch,
    )
