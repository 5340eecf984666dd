"""Other people's state-space duals.

What needs a GPU is written against its published signature and has not been run.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ssmkernels.bench.peers import MAMBA_SSM, TRANSFORMERS, Peer, Setting, refuse

CHUNK = 256  # the default of Mamba-2's configurations

SETTINGS = {
    "ssd": Setting(
        case={"z": False, "state": False},
        arguments={"return_final_state": False},
        note="from a zero state, without gate, output alone",
    )
}


def transformers(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk_size: int | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """What transformers' Mamba-2 calls; without mamba_ssm that is the chunked form in PyTorch."""
    refuse(cu_seqlens is not None, "packed sequences")
    refuse(z is not None, "gate")
    refuse(D is not None and D.ndim == 2, "skip of a channel")
    found = _unwrapped("mamba2_chunk_scan")(
        hidden_states=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        chunk_size=chunk_size or CHUNK,
        D=D,
        dt_bias=dt_bias,
        initial_states=initial_state,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        return_final_states=return_final_state,
    )
    y, last = found if return_final_state else (found, None)
    y = y.to(x.dtype)  # as their mixer does
    return y if last is None else (y, last)


def transformers_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """What transformers' Mamba-2 does for one token; its mixer hands it A, dt, D and the bias expanded."""
    refuse(dt_limit != (0.0, math.inf), "limits of the step size in a step")
    p, n = state.shape[2:]
    expanded = {"dt_bias": dt_bias, "D": D if D is None or D.ndim == 1 else None}
    expanded = {name: None if t is None else t[:, None].expand(-1, p) for name, t in expanded.items()}
    return _unwrapped("mamba2_selective_state_update")(
        state,
        x,
        dt[..., None].expand(-1, -1, p),
        A[:, None, None].expand(-1, p, n),
        B,
        C,
        D=D if D is not None and D.ndim == 2 else expanded["D"],
        dt_bias=expanded["dt_bias"],
        dt_softplus=dt_softplus,
        z=z,
    )


def mamba_ssm_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """mamba_ssm's Triton kernel for one token, which takes numbers of a head as expanded views."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    refuse(dt_limit != (0.0, math.inf), "limits of the step size in a step")
    p, n = state.shape[2:]
    return selective_state_update(
        state,
        x,
        dt[..., None].expand(-1, -1, p),
        A[:, None, None].expand(-1, p, n),
        B,
        C,
        D=D if D is None or D.ndim == 2 else D[:, None].expand(-1, p),
        z=z,
        dt_bias=None if dt_bias is None else dt_bias[:, None].expand(-1, p),
        dt_softplus=dt_softplus,
    )


def _unwrapped(name: str) -> Any:
    """A function of transformers' Mamba-2 in PyTorch, in whose place a kernel from the hub may stand."""
    from transformers.models.mamba2 import modeling_mamba2

    function = getattr(modeling_mamba2, name)
    return getattr(function, "__wrapped__", function)


PEERS = {
    "ssd": (Peer("transformers", TRANSFORMERS, transformers, "in chunks of 256 tokens, in PyTorch"),),
    "ssd_step": (
        Peer("transformers", TRANSFORMERS, transformers_step),
        Peer("mamba_ssm", MAMBA_SSM, mamba_ssm_step),
    ),
}
