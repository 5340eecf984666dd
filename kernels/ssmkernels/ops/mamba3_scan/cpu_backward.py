"""The backward pass of Mamba-3's native recurrence: the state-space dual's, then rotations and coefficients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.validate import precision
from ssmkernels.native import plain
from ssmkernels.ops.mamba3_scan.cpu_arguments import Coefficients, Maps, coefficients, core, last_places, rotate
from ssmkernels.ops.ssd import cpu_backward as dual


class Incoming(NamedTuple):
    y: Tensor
    final_state: Tensor | None


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor | None]:
    c = coefficients(a)
    maps = rotate(a, c.dt, save=True)
    tokens, fields, _kept = core(a, c, maps, saved.starts)
    incoming = Incoming(grads.y.flatten(1, 2), grads.final_state)
    of_core: dict[str, Any] = dual.gradients(tokens, fields, incoming, ("scale", "direct"), by_head=True)
    rank = a.x.shape[2]
    dx = of_core["x"].unflatten(1, (-1, rank))  # (b l r h p)
    dk, dq = (of_core[name].transpose(1, 2).unflatten(2, (-1, rank)) for name in ("B", "C"))  # (b h l r n)
    initial = _initial_gradients(a, c, of_core["initial_state"])
    initial |= _add_final(a, dx, dk.permute(0, 2, 3, 1, 4), grads, initial)
    found: dict[str, Any] = _rotate_gradients(a, maps, dk, dq, grads.final_angle)
    found |= _coefficient_gradients(a, c, of_core, initial.pop("first"), found.pop("dt"))
    z = None if a.z is None else of_core["z"].unflatten(1, (-1, rank))
    return found | initial | {"x": dx, "D": of_core["D"], "z": z}


def _initial_gradients(a: Any, c: Coefficients, dstate: Tensor | None) -> dict[str, Tensor | None]:
    """Of the initial state, key and value, and of μ at the first steps, from that of the core's initial state."""
    found: dict[str, Tensor | None] = {
        "initial_state": dstate,
        "initial_key": None,
        "initial_value": None,
        "first": None,
    }
    for name in ("initial_key", "initial_value"):
        if getattr(a, name) is not None:
            found[name] = torch.zeros_like(getattr(a, name), memory_format=torch.contiguous_format)
    if dstate is not None and a.initial_key is not None and a.initial_value is not None:
        turned, parts = dstate.mT.contiguous(), []  # sums are over the last axis, whatever the batch in the same order
        for value, key in zip(a.initial_value.unbind(1), a.initial_key.unbind(1), strict=True):
            by_value = (dstate * key[..., None, :]).sum(-1)  # (s h p)
            by_key = (turned * value[..., None, :]).sum(-1)  # (s h n)
            parts.append((by_value, by_key, (by_value * value).sum(-1)))
        values, keys, firsts = zip(*parts, strict=True)
        found["initial_value"] = c.first[:, None, :, None] * torch.stack(values, dim=1)
        found["initial_key"] = c.first[:, None, :, None] * torch.stack(keys, dim=1)
        found["first"] = functools.reduce(torch.add, firsts)
    return found


def _add_final(
    a: Any, dx: Tensor, dk: Tensor, grads: Any, initial: dict[str, Tensor | None]
) -> dict[str, Tensor | None]:
    """Adds the gradients of the last keys and values to those of their steps, or of what was there before."""
    last, empty = last_places(a)
    changed: dict[str, Tensor | None] = {}
    for to, gradient, name in ((dk, grads.final_key, "initial_key"), (dx, grads.final_value, "initial_value")):
        if gradient is None:
            continue
        there = ~empty
        if a.cu_seqlens is None:
            if to.shape[1]:
                to[:, -1] += gradient.to(to.dtype)
        else:
            to[0, last[there]] += gradient[there].to(to.dtype)
        before = initial[name]
        if before is not None:
            changed[name] = before + gradient * empty.view(-1, 1, 1, 1)
    return changed


def _rotate_gradients(a: Any, maps: Maps, dk: Tensor, dq: Tensor, dfinal: Tensor | None) -> dict[str, Tensor | None]:
    wide = precision(a.x)
    batch, length, rank, groups, n = a.B.shape
    heads, sequences = a.x.shape[3], max(int(maps.fields["sequences"]), 1)
    count = a.angles.shape[2]

    def empty(*shape: int) -> Tensor:
        return a.x.new_empty(shape, dtype=wide)

    biases = [a.x.new_zeros((sequences, heads, rank, n), dtype=wide) for _ in range(2)]
    made = {
        "dB": empty(batch, length, rank, groups, n),
        "dC": empty(batch, length, rank, groups, n),
        "ddt": empty(batch, length, heads),
        "dangles": empty(batch, length, count),
        "dB_bias": biases[0],
        "dC_bias": biases[1],
        "dinitial": empty(int(maps.fields["sequences"]), heads, count),
        "dk": dk,
        "dq": dq,
    }
    dfinal = None if dfinal is None else plain(dfinal, wide)
    addresses = {name: t.data_ptr() for name, t in made.items()}
    native.run(
        "mamba3_rotate_backward", maps.fields | addresses | {"dfinal": 0 if dfinal is None else dfinal.data_ptr()}
    )
    return {
        "B": made["dB"],
        "C": made["dC"],
        "dt": made["ddt"],
        "angles": made["dangles"],
        "B_bias": biases[0][0],
        "C_bias": biases[1][0],
        "initial_angle": made["dinitial"],
    }


def _coefficient_gradients(
    a: Any, c: Coefficients, of_core: dict[str, Any], dfirst: Tensor | None, ddt: Tensor
) -> dict[str, Tensor]:
    """Of dt, A and λ, from those of decay, scale and direct outputs, and that of dt as the angles' step."""
    rank = a.x.shape[2]
    ddecay = of_core["dt"].unflatten(1, (-1, rank))[:, :, 0]
    dscale, ddirect = (
        functools.reduce(torch.add, of_core[name].unflatten(1, (-1, rank)).unbind(2)) for name in ("scale", "direct")
    )
    dgamma = dscale + ddirect
    dmu = F.pad(dscale[:, :-1], (0, 0, min(1, dscale.shape[1]), 0))  # of step t from the scale of step t - 1
    if a.cu_seqlens is None:
        if dfirst is not None and dmu.shape[1]:
            dmu[:, 0] += dfirst
    elif dmu.shape[1]:
        there = a.cu_seqlens.diff() > 0
        first = a.cu_seqlens[:-1][there]
        dmu[0, first] = 0 if dfirst is None else dfirst[there]
    return {
        "dt": ddt + ddecay * c.A + dgamma * c.trap + dmu * (1 - c.trap),
        "A": ddecay * c.dt,
        "trap": (dgamma - dmu) * c.dt,
    }
