"""What the one-token functions of :mod:`ssmkernels.compat.mamba_ssm` do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels import selective_scan, selective_scan_step
from ssmkernels.compat._dtypes import INDICES, beside, together
from ssmkernels.compat._ssd import head_step, heads_alone
from ssmkernels.core.validate import REAL, check_dtypes, check_options, check_shapes
from ssmkernels.core.written import gradient_wanted


def update(a: Any) -> Tensor:
    """As :func:`ssmkernels.compat.mamba_ssm.selective_state_update`.

    Heads become channels: a head's p channels have their own rows of A, and g groups of heads are g groups of channels.
    """
    if _of_heads(a):
        return head_step(a, a.state, torch.float32)
    of_state = "b p n | b h p n" if a.state_batch_indices is None else "s p n | s h p n"
    heads = a.state.shape[1] if isinstance(a.state, Tensor) and a.state.ndim == 4 else 1
    each = "b h p" if heads > 1 else "b p | b 1 p"
    weight = "h p" if heads > 1 else "p | 1 p"
    sizes = check_shapes(
        a.op,
        {
            "state": (a.state, of_state),
            "x": (a.x, each),
            "dt": (a.dt, each),
            "A": (a.A, "h p n" if heads > 1 else "p n | 1 p n"),
            "B": (a.B, "b n | b g n"),
            "C": (a.C, "b n | b g n"),
            "D": (a.D, weight),
            "z": (a.z, each),
            "dt_bias": (a.dt_bias, weight),
            "state_batch_indices": (a.state_batch_indices, "b"),
        },
        ("state", "x", "dt", "A", "B", "C"),
    )
    check_options(a.op, "bool", dt_softplus=a.dt_softplus)
    check_dtypes(a.op, {"state_batch_indices": a.state_batch_indices}, INDICES)
    check_dtypes(a.op, {"x": a.x, "dt": a.dt, "z": a.z}, REAL)
    g = sizes.get("g", 1)
    if g == 0 or heads % g:
        raise ValueError(f"{a.op}: the {g} groups of `B` and `C` must divide the {heads} heads of `state`")

    rows = a.state_batch_indices
    held = a.state if rows is None else a.state[rows.clamp(min=0)]
    shape, dtype = held.shape, together(a.x, a.dt, a.z, a.state if a.state.dtype == torch.float64 else None)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    held = held.to(torch.promote_types(wide, a.A.dtype if a.A.is_complex() else dtype))
    differentiable = gradient_wanted((held, a.x, a.dt, a.A, a.B, a.C, a.D, a.z, a.dt_bias)) is not None
    if differentiable or not heads_alone(a):
        y, held = _by_channels(a, held, dtype, differentiable)
    else:
        y = head_step(a, held, torch.promote_types(dtype, together(a.B, a.C))).flatten(1)
    if rows is not None:
        kept = rows >= 0
        a.state[rows[kept]] = held.reshape(shape)[kept].to(a.state.dtype)
        y = torch.where(kept[:, None], y, 0)
    elif held is not a.state:
        a.state.copy_(held.reshape(shape))
    return y.to(a.x.dtype).reshape(a.x.shape)


def _of_heads(a: Any) -> bool:
    """Whether a call is Mamba-2's usual token in float32: nothing is left to convert, nor to check before ssd's step.

    A model asks at each token of each layer, and the general way takes a good part of the step's time.
    """
    given = (a.state, a.x, a.dt, a.A, a.B, a.C, a.D, a.dt_bias)
    if torch.is_grad_enabled() or a.z is not None or a.state_batch_indices is not None:
        return False
    if not all(isinstance(t, Tensor) and t.dtype == torch.float32 for t in given) or a.state.ndim != 4:
        return False
    b, h, p, n = a.state.shape
    return (
        type(a.dt_softplus) is bool
        and h > 1
        and 0 not in a.state.shape
        and a.x.shape == a.dt.shape == (b, h, p)
        and a.A.shape == (h, p, n)
        and a.D.shape == a.dt_bias.shape == (h, p)
        and a.B.shape == a.C.shape
        and a.B.shape in ((b, n), (b, 1, n))
        and heads_alone(a)
    )


def _by_channels(a: Any, held: Tensor, dtype: torch.dtype, differentiable: bool) -> tuple[Tensor, Tensor]:
    """A token of the selective scan over the channels of all heads: y (b d), and the state, which it may write."""
    n, b = held.shape[-1], a.x.shape[0]
    u = a.x.reshape(b, -1).to(dtype)
    d = u.shape[1]
    held = held if held.ndim == 3 else held.reshape(b, d, n)  # a view of `state` where it can be
    arguments: dict[str, Any] = {
        "u": u,
        "delta": a.dt.reshape(b, d).to(dtype),
        "A": beside(a.A.reshape(d, n), u),
        "B": beside(a.B, u),
        "C": beside(a.C, u),
        "D": None if a.D is None else beside(a.D.reshape(d), u),
        "z": None if a.z is None else a.z.reshape(b, d).to(dtype),
        "delta_bias": None if a.dt_bias is None else beside(a.dt_bias.reshape(d), u),
    }
    if not differentiable:
        y = selective_scan_step(held, **arguments, delta_softplus=a.dt_softplus, implementation=a.implementation)
        return y, held
    timed = {name: arguments[name][:, None] for name in ("u", "delta", "B", "C", "z") if arguments[name] is not None}
    ys, held = selective_scan(
        **{**arguments, **timed},
        delta_softplus=a.dt_softplus,
        initial_state=held.clone(),  # the state itself is about to change
        return_final_state=True,
        implementation=a.implementation,
    )
    return ys[:, 0], held
