"""One token of a gated DeltaNet layer in the native CPU library (``cpu.cpp``): one call, each weight read once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.native import missing, plain, rows
from ssmkernels.native.prepared import Prepared, update
from ssmkernels.ops.mamba_step.cpu import TILE, refused

__all__ = ["forward", "missing", "prepared", "unsupported"]

STATES = ("q_state", "k_state", "v_state", "state")
MATRICES = ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj", "o_proj")
WIDE = ("q_conv", "k_conv", "v_conv", "A_log", "dt_bias", "norm_weight")
LINE = 16  # numbers to which arrays are rounded up, at most


def unsupported(a: Any) -> str | None:
    return refused(a) or ("no heads or channels" if 0 in a.state.shape[1:] else None)


def forward(a: Any, _: bool) -> Tensor:
    return update(prepared, a, STATES)


def prepared(a: Any) -> Prepared:
    """The kernel's call; a state that is not contiguous is copied."""
    wide = a.state.dtype
    tensors = {name: getattr(a, name).contiguous() for name in (*STATES, *MATRICES)}
    tensors |= {name: plain(getattr(a, name), wide) for name in WIDE}
    x = rows(a.x)
    (batch, m), (_, heads, keys, values), width = x.shape, a.state.shape, a.q_conv.shape[1]
    groups = a.q_proj.shape[0] // keys
    y = x.new_empty(batch, m)
    threads = native.threads(3 * a.g_proj.numel())
    step = (keys + 1) * TILE + 4 * (keys + LINE) + 8 * LINE  # some columns of a state, a tile of one token
    each = max(step, (width + 1) * TILE)
    between = batch * (m + 4 * groups * keys + 4 * heads * values + 2 * heads)
    scratch = a.state.new_empty(between + threads * each)
    return Prepared(
        "gated_deltanet_step",
        {
            **{name: t.data_ptr() for name, t in tensors.items()},
            "x": x.data_ptr(),
            "y": y.data_ptr(),
            "scratch": scratch.data_ptr(),
            "dtype": native.DTYPES[x.dtype],
            "batch": batch,
            "m": m,
            "heads": heads,
            "groups": groups,
            "keys": keys,
            "values": values,
            "width": width,
            "threads": threads,
            "thread_scratch": each,
            "x_batch": x.stride(0),
            "beta_scale": a.beta_scale,
            "eps": a.norm_eps,
        },
        (*tensors.values(), x),
        y,
        scratch,
    )
