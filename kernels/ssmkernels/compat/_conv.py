"""What the functions of :mod:`ssmkernels.compat.causal_conv1d` do: the package's layout into ours and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import causal_conv1d, causal_conv1d_step
from ssmkernels.compat._dtypes import INDICES, beside
from ssmkernels.compat.sequences import packed, placed, runs
from ssmkernels.core.validate import check_dtypes, check_options, check_shapes, precision
from ssmkernels.core.written import gradient_wanted


def conv(a: Any) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`ssmkernels.compat.causal_conv1d.causal_conv1d_fn`."""
    check_shapes(
        a.op,
        {
            "x": (a.x, "b d l"),
            "weight": (a.weight, "d w"),
            "bias": (a.bias, "d"),
            "seq_idx": (a.seq_idx, "b l"),
            "initial_states": (a.initial_states, "b d w-1"),
            "final_states_out": (a.final_states_out, "b d w-1"),
        },
        ("x", "weight"),
    )
    check_options(a.op, "bool", return_final_states=a.return_final_states)
    activation = _activation(a.op, a.activation)
    time_major, weight, bias = a.x.transpose(1, 2), beside(a.weight, a.x), beside(a.bias, a.x)
    state = None if a.initial_states is None else a.initial_states.transpose(1, 2).to(precision(a.x))
    if a.seq_idx is not None:
        if a.return_final_states or a.final_states_out is not None:
            raise ValueError(f"{a.op}: with `seq_idx` there are no final states: leave away `return_final_states`")
        y = _by_sequence(a, time_major, weight, bias, activation, state)
        return y.transpose(1, 2)
    y, last = causal_conv1d(
        time_major,
        weight,
        bias,
        activation,
        initial_state=state,
        return_final_state=True,
        implementation=a.implementation,
    )
    final = last.transpose(1, 2).to(a.x.dtype)
    if a.final_states_out is not None:
        final = a.final_states_out.copy_(final)
    return (y.transpose(1, 2), final) if a.return_final_states else y.transpose(1, 2)


def _by_sequence(
    a: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial_state: Tensor | None
) -> Tensor:
    """x (b l d), initial state (b w-1 d) or None → y (b l d): all rows packed, a border at each change of number."""
    (b, l, d), w = x.shape, weight.shape[1]
    run, cu_seqlens = runs(a.op, a.seq_idx, reach=w)
    y, _ = causal_conv1d(
        packed(x),
        weight,
        bias,
        activation,
        initial_state=placed(initial_state, run, len(cu_seqlens) - 1),
        return_final_state=True,
        cu_seqlens=cu_seqlens,
        implementation=a.implementation,
    )
    return torch.where(a.seq_idx[..., None] >= 0, y.view(b, l, d), 0)


def update(a: Any) -> Tensor:
    """As :func:`ssmkernels.compat.causal_conv1d.causal_conv1d_update`."""
    sizes = check_shapes(
        a.op,
        {
            "x": (a.x, "b d | b d l"),
            "weight": (a.weight, "d w"),
            "bias": (a.bias, "d"),
            "conv_state": (a.conv_state, "b d m" if a.conv_state_indices is None else "s d m"),
            "cache_seqlens": (a.cache_seqlens, "b"),
            "conv_state_indices": (a.conv_state_indices, "b"),
        },
        ("x", "weight", "conv_state"),
    )
    check_dtypes(a.op, {"cache_seqlens": a.cache_seqlens, "conv_state_indices": a.conv_state_indices}, INDICES)
    before, m = sizes["w"] - 1, sizes["m"]
    if m < before:
        raise ValueError(
            f"{a.op}: `conv_state` must hold at least {before} inputs, w - 1; got {tuple(a.conv_state.shape)}"
        )
    rows = a.conv_state_indices
    held = a.conv_state if rows is None else a.conv_state[rows.clamp(min=0)]  # (b d m)
    new = a.x[..., None] if a.x.ndim == 2 else a.x
    if a.cache_seqlens is None:
        state = held[..., m - before :]
        held = torch.cat([held, new.to(held.dtype)], dim=-1)[..., new.shape[-1] :]
    else:
        state = held.gather(2, _ring(a.cache_seqlens, -before, 0, held))
        last = min(new.shape[-1], m)  # earlier ones would be overwritten by later ones
        places = _ring(a.cache_seqlens, new.shape[-1] - last, new.shape[-1], held)
        held = held.scatter(2, places, new[..., new.shape[-1] - last :].to(held.dtype))
    weight, bias, activation = beside(a.weight, a.x), beside(a.bias, a.x), _activation(a.op, a.activation)
    one = new.shape[-1] == 1 and gradient_wanted((a.x, weight, bias, state)) is None
    if one and a.implementation is None and a.x.device.type == "cpu":
        y = _one_token(state, new, weight, bias, activation)
    else:
        initial = state.transpose(1, 2).to(precision(a.x), copy=True)  # the state itself is about to change
        if one:
            y = causal_conv1d_step(initial, new[..., 0], weight, bias, activation, implementation=a.implementation)
            y = y[:, None]
        else:
            y, _ = causal_conv1d(
                new.transpose(1, 2),
                weight,
                bias,
                activation,
                initial_state=initial,
                return_final_state=True,
                implementation=a.implementation,
            )
    if rows is None:
        a.conv_state.copy_(held)
    else:
        kept = rows >= 0
        a.conv_state[rows[kept]] = held[kept]
        y = torch.where(kept[:, None, None], y, 0)
    return y[:, 0] if a.x.ndim == 2 else y.transpose(1, 2)


def _one_token(state: Tensor, new: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """The output (b 1 d) for inputs (b d 1) after (b d w-1): a sum over a few taps in a handful of operations, which
    costs less than to bring the state into the layout of our op."""
    wide = precision(new)
    y = (torch.cat([state.to(wide), new.to(wide)], dim=-1) * weight.to(wide)).sum(-1)
    if bias is not None:
        y = y + bias.to(wide)
    return (y if activation is None else F.silu(y)).to(new.dtype)[:, None]


def _ring(cache_seqlens: Tensor, start: int, end: int, state: Tensor) -> Tensor:
    """Places in a ring (b d m) of the tokens from ``start`` to ``end``, counted from the next one: (b d end-start)."""
    tokens = cache_seqlens[:, None].long() + torch.arange(start, end, device=state.device)
    return (tokens % max(1, state.shape[2]))[:, None].expand(-1, state.shape[1], -1)


def _activation(op: str, name: str | None) -> str | None:
    if name not in (None, "silu", "swish"):
        raise ValueError(f"{op}: `activation` must be None, 'silu' or 'swish'; got {name!r}")
    return None if name is None else "silu"
