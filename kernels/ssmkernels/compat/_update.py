"""What the one-token functions of :mod:`ssmkernels.compat.mamba_ssm` do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels import selective_scan, selective_scan_step
from ssmkernels.compat._dtypes import INDICES, beside, together
from ssmkernels.core.validate import check_dtypes, check_options, check_shapes, gradient_wanted, precision


def update(
    op: str,
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
    implementation: str | None,
) -> Tensor:
    """As :func:`ssmkernels.compat.mamba_ssm.selective_state_update`; ``op`` is what errors call it.

    Heads become channels: a head's p channels have their own rows of A, and g groups of heads are g groups of channels.
    """
    of_state = "b p n | b h p n" if state_batch_indices is None else "s p n | s h p n"
    heads = state.shape[1] if isinstance(state, Tensor) and state.ndim == 4 else 1
    each = "b h p" if heads > 1 else "b p | b 1 p"
    weight = "h p" if heads > 1 else "p | 1 p"
    sizes = check_shapes(
        op,
        {
            "state": (state, of_state),
            "x": (x, each),
            "dt": (dt, each),
            "A": (A, "h p n" if heads > 1 else "p n | 1 p n"),
            "B": (B, "b n | b g n"),
            "C": (C, "b n | b g n"),
            "D": (D, weight),
            "z": (z, each),
            "dt_bias": (dt_bias, weight),
            "state_batch_indices": (state_batch_indices, "b"),
        },
        ("state", "x", "dt", "A", "B", "C"),
    )
    check_options(op, "bool", dt_softplus=dt_softplus)
    check_dtypes(op, {"state_batch_indices": state_batch_indices}, INDICES)
    g, n = sizes.get("g", 1), sizes["n"]
    if g == 0 or heads % g:
        raise ValueError(f"{op}: the {g} groups of `B` and `C` must divide the {heads} heads of `state`")

    dtype = together(x, dt, z, state if state.dtype == torch.float64 else None)
    b, d = x.shape[0], heads * sizes["p"]
    u = x.reshape(b, d).to(dtype)
    arguments: dict[str, Any] = {
        "u": u,
        "delta": dt.reshape(b, d).to(dtype),
        "A": beside(A.reshape(d, n), u),
        "B": beside(B, u),
        "C": beside(C, u),
        "D": None if D is None else beside(D.reshape(d), u),
        "z": None if z is None else z.reshape(b, d).to(dtype),
        "delta_bias": None if dt_bias is None else beside(dt_bias.reshape(d), u),
    }
    rows = state_batch_indices
    held = state if rows is None else state[rows.clamp(min=0)]
    shape = held.shape
    held = held.to(torch.promote_types(precision(u), A.dtype if A.is_complex() else u.dtype))
    held = held if held.ndim == 3 else held.reshape(b, d, n)  # a view of `state` where it can be

    if gradient_wanted((held, *arguments.values())) is None:
        y = selective_scan_step(held, **arguments, delta_softplus=dt_softplus, implementation=implementation)
    else:
        timed = {
            name: arguments[name][:, None] for name in ("u", "delta", "B", "C", "z") if arguments[name] is not None
        }
        y, held = selective_scan(
            **{**arguments, **timed},
            delta_softplus=dt_softplus,
            initial_state=held.clone(),  # the state itself is about to change
            return_final_state=True,
            implementation=implementation,
        )
        y = y[:, 0]
    if rows is not None:
        kept = rows >= 0
        state[rows[kept]] = held.reshape(shape)[kept].to(state.dtype)
        y = torch.where(kept[:, None], y, 0)
    elif held is not state:
        state.copy_(held.reshape(shape))
    return y.to(x.dtype).reshape(x.shape)
