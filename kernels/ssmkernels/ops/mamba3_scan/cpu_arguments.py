"""Mamba-3's recurrence as the native state-space dual takes it (``ssd/cpu.h``): coefficients, keys, queries, state.

With γ = λ Δ and μ = (1 - λ) Δ, an input has reached the states of later steps by γ_t + μ_{t+1}, its ``scale``, and the
outputs of its own step by γ_t, ``direct``. What the input before the first still adds goes into the initial state.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.native import fields_of, plain, rows
from ssmkernels.ops.ssd.cpu_arguments import CHUNK, LONGEST, values


def unit(a: Any) -> int:
    """Inputs that a chunk has a multiple of: whole vectors, and whole steps."""
    return math.lcm(16, a.x.shape[-3])


def chunk_length(a: Any) -> int:
    """Inputs of a chunk."""
    most, wanted = LONGEST // unit(a), CHUNK if a.chunk_size is None else a.chunk_size
    return min(-(-wanted // unit(a)), most) * unit(a)


class Coefficients(NamedTuple):
    """All ``(b, l, h)``, in the precision of sums, but ``first``, ``(s, h)``: μ of each sequence's first step."""

    dt: Tensor
    A: Tensor
    trap: Tensor
    decay: Tensor  # its logarithm
    scale: Tensor
    direct: Tensor
    first: Tensor


class Maps(NamedTuple):
    """``k`` and ``q`` ``(b, h, l, r, n)`` lie head by head; ``turns`` ``(b, h, l, a)`` are the angles, where saved."""

    k: Tensor
    q: Tensor
    turns: Tensor | None
    final_angle: Tensor
    fields: dict[str, float]
    kept: list[Any]


class Core(NamedTuple):
    """The arguments of ``ssd``: inputs of one step are so many of its tokens."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: None
    dt_softplus: bool
    dt_limit: tuple[float, float]
    chunk_size: int | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None


def coefficients(a: Any) -> Coefficients:
    wide = precision(a.x)
    dt, A, trap = (t.to(wide) for t in (a.dt, a.A, a.trap))
    gamma = trap * dt
    mu = dt - gamma
    following = F.pad(mu[:, 1:], (0, 0, 0, min(1, mu.shape[1])))
    if a.cu_seqlens is None:
        first = mu[:, 0] if mu.shape[1] else mu.new_zeros(mu.shape[0], mu.shape[2])
    else:
        empty = a.cu_seqlens.diff() == 0
        if mu.shape[1]:
            following[0, a.cu_seqlens[1:][~empty] - 1] = 0
            first = mu[0, a.cu_seqlens[:-1].clamp(max=mu.shape[1] - 1)].masked_fill(empty[:, None], 0)
        else:
            first = mu.new_zeros(len(empty), mu.shape[2])
    return Coefficients(dt, A, trap, dt * A, gamma + following, gamma, first)


def rotate(a: Any, dt: Tensor, save: bool) -> Maps:
    """Keys, queries and angles; the fields and tensors are those of the call."""
    wide = precision(a.x)
    B, C = rows(a.B), rows(a.C)
    batch, length, rank, groups, n = B.shape
    heads, count = a.x.shape[3], a.angles.shape[2]
    sequences = batch if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    k, q = (a.x.new_empty((batch, heads, length, rank, n), dtype=wide) for _ in range(2))
    turns = a.x.new_empty((batch, heads, length, count), dtype=wide) if save else None
    final_angle = a.x.new_empty((sequences, heads, count), dtype=wide)
    large_pages(k, q, turns)
    B_bias, C_bias, initial = (None if t is None else plain(t, wide) for t in (a.B_bias, a.C_bias, a.initial_angle))
    tensors = {
        "B": B,
        "C": C,
        "dt": plain(dt, wide),
        "angles": plain(a.angles, wide),
        "B_bias": B_bias,
        "C_bias": C_bias,
        "initial": initial,
        "cu_seqlens": None if a.cu_seqlens is None else a.cu_seqlens.contiguous(),
        "k": k,
        "q": q,
        "turns": turns,
        "final_angle": final_angle,
    }
    found = fields_of(tensors, a.x, a.cu_seqlens) | {
        "heads": heads,
        "groups": groups,
        "rank": rank,
        "n": n,
        "angle_count": count,
        "interleaved": a.interleaved,
        "threads": native.threads(k.numel()),
    }
    for name, t in (("B", B), ("C", C)):
        for place, stride in zip(("batch", "time", "rank", "group"), t.stride(), strict=False):
            found[f"{name}_{place}"] = stride
    native.run("mamba3_rotate", found)
    return Maps(k, q, turns, final_angle, found, list(tensors.values()))


def core(a: Any, c: Coefficients, maps: Maps, starts: Tensor | None) -> tuple[Core, dict[str, float], list[Any]]:
    """The call of the state-space dual, its fields, and the tensors that they point into."""
    rank = a.x.shape[2]
    one = c.decay.new_ones(c.decay.shape[2])
    dt = _of_tokens(c.decay, rank)
    if rank > 1:
        dt.unflatten(1, (-1, rank))[:, :, 1:] = 0  # a step decays once
    tokens = Core(
        x=a.x.flatten(1, 2),
        dt=dt,
        A=one,
        B=maps.k.flatten(2, 3).transpose(1, 2),
        C=maps.q.flatten(2, 3).transpose(1, 2),
        D=a.D,
        z=None if a.z is None else a.z.flatten(1, 2),
        dt_bias=None,
        dt_softplus=False,
        dt_limit=(-math.inf, math.inf),
        chunk_size=chunk_length(a),
        initial_state=initial_state(a, c),
        cu_seqlens=None if a.cu_seqlens is None else a.cu_seqlens * rank,
    )
    fields, kept = values(tokens, starts)
    scale, direct = (_of_tokens(t, rank) for t in (c.scale, c.direct))
    fields |= {"scale": scale.data_ptr(), "direct": direct.data_ptr(), "rank": rank}
    return tokens, fields, [kept, scale, direct, tokens]


def initial_state(a: Any, c: Coefficients) -> Tensor | None:
    """What the state is between the halves of the first step, ``(s, h, p, n)``."""
    if a.initial_key is None or a.initial_value is None:
        return a.initial_state
    state = a.initial_state
    # A product and a sum at a time: the order of PyTorch's own products and long sums depends on the batch
    for value, key in zip(a.initial_value.unbind(1), a.initial_key.unbind(1), strict=True):
        fed = (c.first[..., None] * value)[..., None] * key[..., None, :]
        state = fed if state is None else state + fed
    return state


def _of_tokens(t: Tensor, rank: int) -> Tensor:
    """(b l h) → (b (l r) h), contiguous."""
    return t.contiguous() if rank == 1 else torch.repeat_interleave(t, rank, dim=1)


def last_steps(a: Any, k: Tensor) -> tuple[Tensor, Tensor]:
    """Keys ``(s, r, h, n)`` and values ``(s, r, h, p)`` of the last steps; what was before where there is none."""
    last, empty = last_places(a)
    found = []
    for t, before in ((k.permute(0, 2, 3, 1, 4), a.initial_key), (a.x, a.initial_value)):
        if empty.all():
            none = t.new_zeros((len(empty), *t.shape[2:]), dtype=precision(a.x))
            found.append(none if before is None else before)
            continue
        ends = t[:, -1] if a.cu_seqlens is None else t[0, last]
        ends = ends.to(precision(a.x))
        absent = empty.view(-1, 1, 1, 1)
        found.append(torch.where(absent, torch.zeros_like(ends) if before is None else before, ends))
    return found[0], found[1]


def last_places(a: Any) -> tuple[Tensor, Tensor]:
    """Where each sequence's last step lies, and whether it has none; both ``(s)``."""
    batch, length = a.x.shape[:2]
    if a.cu_seqlens is None:
        return torch.full((batch,), length - 1), torch.full((batch,), length == 0)
    return (a.cu_seqlens[1:] - 1).clamp(min=0).long(), a.cu_seqlens.diff() == 0
