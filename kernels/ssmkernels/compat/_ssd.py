"""What the functions of Mamba-2 in :mod:`ssmkernels.compat.mamba_ssm` do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels import ssd, ssd_step
from ssmkernels.compat._dtypes import beside, together
from ssmkernels.compat.sequences import packed, placed, runs
from ssmkernels.core.validate import REAL, check_dtypes, check_options, check_shapes, precision


def chunk_scan(a: Any) -> Tensor | tuple[Tensor, ...]:
    """As :func:`ssmkernels.compat.mamba_ssm.mamba_chunk_scan_combined`."""
    check_shapes(
        a.op,
        {
            "x": (a.x, "b l h p"),
            "dt": (a.dt, "b l h"),
            "A": (a.A, "h"),
            "B": (a.B, "b l g n"),
            "C": (a.C, "b l g n"),
            "D": (a.D, "h | h p"),
            "z": (a.z, "b l h p"),
            "dt_bias": (a.dt_bias, "h"),
            "initial_states": (a.initial_states, "b h p n"),
            "seq_idx": (a.seq_idx, "b l"),
            "cu_seqlens": (a.cu_seqlens, "borders"),
        },
        ("x", "dt", "A", "B", "C"),
    )
    flags = ("dt_softplus", "return_final_states", "return_varlen_states")
    check_options(a.op, "bool", **{name: getattr(a, name) for name in flags})
    timed: dict[str, Any] = {"x": a.x, "dt": a.dt, "B": a.B, "C": a.C, "z": a.z}
    check_dtypes(a.op, {**timed, "initial_states": a.initial_states}, REAL)
    dtype = together(*timed.values())
    timed = {name: None if t is None else t.to(dtype) for name, t in timed.items()}
    x, wide = timed["x"], precision(timed["x"])
    state = None if a.initial_states is None else a.initial_states.to(wide)
    cu_seqlens = None
    if a.seq_idx is not None:
        run, cu_seqlens = runs(a.op, a.seq_idx)
        state = placed(state, run, len(cu_seqlens) - 1)
        timed = {name: packed(t) for name, t in timed.items()}
    if a.return_varlen_states:
        _check_borders(a, cu_seqlens)
    y, last = ssd(
        **timed,
        **{name: beside(getattr(a, name), x) for name in ("A", "D", "dt_bias")},
        dt_softplus=a.dt_softplus,
        dt_limit=a.dt_limit,
        chunk_size=a.chunk_size,
        initial_state=state,
        return_final_state=True,
        cu_seqlens=cu_seqlens,
        implementation=a.implementation,
    )
    found = [y.view(a.x.shape).to(a.x.dtype).contiguous()]  # as the package's, which callers may `view`
    if a.return_final_states:
        found.append(last if cu_seqlens is None or run.shape[1] == 0 else last[run[:, -1]])
    if a.return_varlen_states:
        found.append(last)
    return found[0] if len(found) == 1 else tuple(found)


def _check_borders(a: Any, borders: Tensor | None) -> None:
    """States after each sequence are those between the borders of ``seq_idx``, which ``cu_seqlens`` has to name."""
    if a.cu_seqlens is None or borders is None or not torch.equal(a.cu_seqlens.to(borders.dtype), borders):
        told = "None" if a.cu_seqlens is None else str(a.cu_seqlens.tolist())
        raise ValueError(
            f"{a.op}: `return_varlen_states` needs `seq_idx`, and in `cu_seqlens` the borders at which it changes; got "
            f"{told}, and {'no `seq_idx`' if borders is None else f'borders at {borders.tolist()}'}"
        )


def heads_alone(a: Any) -> bool:
    """Whether Δ and A of a :func:`~ssmkernels.compat.mamba_ssm.selective_state_update` are one number for each head,
    expanded over its channels, so that it is a step of ``ssd``."""
    if a.state.ndim != 4 or a.x.ndim != 3:
        return False
    expanded = [a.A.stride(-1), a.A.stride(-2), a.dt.stride(-1), 0 if a.dt_bias is None else a.dt_bias.stride(-1)]
    return not any(expanded) and not a.A.is_complex()


def head_step(a: Any, held: Tensor, dtype: torch.dtype) -> Tensor:
    """Such a step: the output (b h p); writes ``held`` (b h p n), in the precision of sums."""
    x = a.x.to(dtype)
    B, C = (t.to(dtype).reshape(len(held), -1, held.shape[-1]) for t in (a.B, a.C))
    return ssd_step(
        held,
        x,
        a.dt[..., 0].to(dtype),
        beside(a.A[:, 0, 0], x),
        B,
        C,
        beside(a.D, x),
        None if a.z is None else a.z.to(dtype),
        None if a.dt_bias is None else beside(a.dt_bias[:, 0], x),
        a.dt_softplus,
        implementation=a.implementation,
    )
