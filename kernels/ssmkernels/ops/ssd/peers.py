"""Other people's state-space duals.

What needs a GPU is written against its published signature and has not been run.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.bench.peers import MAMBA_SSM, TRANSFORMERS, Peer, Setting, calls_like, refuse
from ssmkernels.ops.ssd import external_mamba_ssm as package

CHUNK = 256  # the default of Mamba-2's configurations

SETTINGS = {
    "ssd": Setting(
        case={"z": False, "state": False},
        arguments={"return_final_state": False},
        note="from a zero state, without gate, output alone",
    )
}


@calls_like("ssd", takes="D dt_bias dt_softplus dt_limit chunk_size initial_state return_final_state")
def transformers(a: Any) -> Tensor | tuple[Tensor, Tensor]:
    """What transformers' Mamba-2 calls; without mamba_ssm that is the chunked form in PyTorch."""
    refuse(a.D is not None and a.D.ndim == 2, "skip of a channel")
    found = _unwrapped("mamba2_chunk_scan")(
        hidden_states=a.x,
        dt=a.dt,
        A=a.A,
        B=a.B,
        C=a.C,
        chunk_size=a.chunk_size or CHUNK,
        D=a.D,
        dt_bias=a.dt_bias,
        initial_states=a.initial_state,
        dt_softplus=a.dt_softplus,
        dt_limit=a.dt_limit,
        return_final_states=a.return_final_state,
    )
    y, last = found if a.return_final_state else (found, None)
    y = y.to(a.x.dtype)  # as their mixer does
    return y if last is None else (y, last)


@calls_like("ssd", takes="D z dt_bias dt_softplus dt_limit chunk_size initial_state return_final_state")
def mamba_ssm(a: Any) -> Tensor | tuple[Tensor, Tensor]:
    """mamba_ssm's Triton kernels."""
    y, last = package.call(a)
    return (y, last) if a.return_final_state else y


@calls_like("ssd_step", takes="D z dt_bias dt_softplus")
def transformers_step(a: Any) -> Tensor:
    """What transformers' Mamba-2 does for one token."""
    return _unwrapped("mamba2_selective_state_update")(**_expanded(a))


@calls_like("ssd_step", takes="D z dt_bias dt_softplus")
def mamba_ssm_step(a: Any) -> Tensor:
    """mamba_ssm's Triton kernel for one token."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    arguments = _expanded(a)
    return selective_state_update(x=arguments.pop("hidden_states"), **arguments)


def _expanded(a: Any) -> dict[str, Any]:
    """The arguments of both, which take a head's numbers as views that are expanded over its channels and states."""
    p, n = a.state.shape[2:]
    return {
        "state": a.state,
        "hidden_states": a.x,
        "dt": a.dt[..., None].expand(-1, -1, p),
        "A": a.A[:, None, None].expand(-1, p, n),
        "B": a.B,
        "C": a.C,
        "D": a.D if a.D is None or a.D.ndim == 2 else a.D[:, None].expand(-1, p),
        "z": a.z,
        "dt_bias": None if a.dt_bias is None else a.dt_bias[:, None].expand(-1, p),
        "dt_softplus": a.dt_softplus,
    }


def _unwrapped(name: str) -> Any:
    """A function of transformers' Mamba-2 in PyTorch, in whose place a kernel from the hub may stand."""
    from transformers.models.mamba2 import modeling_mamba2

    function = getattr(modeling_mamba2, name)
    return getattr(function, "__wrapped__", function)


PEERS = {
    "ssd": (
        Peer("transformers", TRANSFORMERS, transformers, "in chunks of 256 tokens, in PyTorch"),
        Peer("mamba_ssm", MAMBA_SSM, mamba_ssm, "in float32 its products are rounded to TF32"),
    ),
    "ssd_step": (
        Peer("transformers", TRANSFORMERS, transformers_step),
        Peer("mamba_ssm", MAMBA_SSM, mamba_ssm_step),
    ),
}
