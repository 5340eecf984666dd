"""What stands around the linear recurrence of C and n in the kernels: a column of ones, the division, and m's gradient.

With m of the recurrence known, C and n are one linear recurrence, the state-space dual's: the values and one more
column of ones are its inputs, keys and queries its maps; a token counts exp(i - m), and the state keeps exp(decay).

Decays and weights are differentiated as if m were a constant. What m gets through them, through exp(-m) in the division
and through the final state is added up token by token, as in the recurrence (``cpu_gates.cpp`` says how).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.ops.mamba3_scan.cpu_arguments import Core
from ssmkernels.ops.mlstm.reference import EPSILON, denominator, scale_of

SAVES = ("y", "sums", "exact", "m")


def recurrence(a: Any, values: Tensor, keys: Tensor, queries: Tensor, decay: Tensor, chunk_size: int | None) -> Core:
    """The call of the state-space dual."""
    return Core(
        x=values,
        dt=decay,
        A=decay.new_ones(decay.shape[2]),
        B=keys,
        C=queries,
        D=None,
        z=None,
        dt_bias=None,
        dt_softplus=False,
        dt_limit=(-math.inf, math.inf),
        chunk_size=chunk_size,
        initial_state=_initial_state(a),
        cu_seqlens=a.cu_seqlens,
    )


def beside_ones(a: Any) -> Tensor:
    """The values and a column of ones, ``(b, l, h, v + 1)``."""
    x = a.v.new_empty((*a.v.shape[:-1], a.v.shape[-1] + 1), dtype=precision(a.q))
    large_pages(x)
    x[..., :-1] = a.v
    x[..., -1] = 1
    return x


def _initial_state(a: Any) -> Tensor | None:
    """C and n, transposed and one below the other, ``(s, h, v + 1, k)``; None where both are 0."""
    if a.initial_C is None and a.initial_n is None:
        return None
    return _together(a.initial_C, a.initial_n, a.v.shape[-1])


def _together(C: Tensor | None, n: Tensor | None, values: int) -> Tensor:
    like = n if n is not None else cast(Tensor, C)[..., 0]
    C = like.new_zeros((*like.shape, values)) if C is None else C
    n = torch.zeros_like(like) if n is None else n
    return torch.cat([C.mT, n[..., None, :]], dim=2)


def empty(a: Any, save: bool) -> tuple[Tensor, ...]:
    """The results, and where they are saved scaled n·q, y before it is rounded, and m."""
    wide, new = precision(a.q), a.q.new_empty
    sums, m = (new(a.i.shape if save else 0, dtype=wide) for _ in range(2))
    exact = new(a.v.shape if save and a.q.dtype != wide else 0, dtype=wide)
    return *a.declared.outputs(a), sums, exact, m


def finish(a: Any, save: bool, together: Tensor, state: Tensor, m: Tensor, final_m: Tensor) -> tuple[Tensor, ...]:
    """What :func:`empty` says, from the recurrence's outputs ``(b, l, h, v + 1)`` and its final state."""
    y, final_C, final_n, _, sums, exact, kept = empty(a, save)
    large_pages(y, exact)
    scale = scale_of(a.scale, a.q)
    scaled = together[..., -1] * scale  # (b l h)
    below = denominator(scaled, m)
    to = exact if exact.numel() else y
    torch.mul(together[..., :-1], (scale / below)[..., None], out=to)
    if to is not y:
        y.copy_(to)
    if save:
        sums.copy_(scaled)
        kept.copy_(m)
    final_C.copy_(state[:, :, :-1].mT)
    final_n.copy_(state[:, :, -1])
    return y, final_C, final_n, final_m, sums, exact, kept


def gradients(
    a: Any,
    saved: Any,
    grads: Any,
    of_recurrence: Callable[[Tensor | None], dict[str, Any]],
    of_gates: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
) -> dict[str, Tensor | None]:
    """Of all arguments.

    Args:
        of_recurrence: takes the gradient of the recurrence's final state; returns those of B, C, x, decay, weight and
            initial_state, and that of m through what outputs are divided by.
        of_gates: takes the gradients of decay and weight as if m were a constant, and of m at each token and at the
            end; returns those of i, f and the initial m.
    """
    dC, dn = grads.final_C, grads.final_n
    dstate = None
    if dC is not None or dn is not None:
        dstate = _together(dC, dn, a.v.shape[-1])
    found = of_recurrence(dstate)
    dfinal = grads.final_m
    if dfinal is None:
        sequences = a.i.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
        dfinal = found["m"].new_zeros(sequences, a.i.shape[2])
    di, df, dinitial = of_gates(found["decay"], found["weight"], found["m"], dfinal.contiguous())
    dC, dn = _of_initial(a, found["initial_state"])
    return {
        "q": found.pop("C").contiguous(),
        "k": found.pop("B").contiguous(),
        "v": found.pop("x").contiguous(),
        "i": di,
        "f": df,
        "initial_C": dC,
        "initial_n": dn,
        "initial_m": None if a.initial_m is None else dinitial,
    }


def of_division(a: Any, saved: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the sums before scaling, ``(b, l, h, v + 1)``, and of m, ``(b, l, h)``."""
    wide = precision(a.q)
    scale, sums, below = scale_of(a.scale, a.q), saved.sums, denominator(saved.sums, saved.m)
    gradient = dy.new_empty((*dy.shape[:-1], dy.shape[-1] + 1), dtype=wide)
    large_pages(gradient)
    torch.mul(dy, (scale / below)[..., None], out=gradient[..., :-1])
    y = saved.exact if saved.exact.numel() else saved.y
    product, of_sums = (dy * y).sum(-1), counted(sums, torch.exp(-saved.m))
    gradient[..., -1] = -product / below * of_sums * sums.sign() * scale
    return gradient, product * (1 - of_sums) * of_floor(saved.m)


def counted(sums: Tensor, floor: Tensor) -> Tensor:
    """How much of the gradient of max(|sums|, floor) goes to |sums|: 1, 0, or a half where both are equal."""
    return torch.where(sums.abs() == floor, 0.5, (sums.abs() > floor).to(sums.dtype))


def of_floor(m: Tensor) -> Tensor:
    """exp(-m) / (exp(-m) + ε), whatever overflows."""
    return 1 / (1 + EPSILON * torch.exp(m))


def _of_initial(a: Any, dstate: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if dstate is None:
        return None, None
    return (
        None if a.initial_C is None else dstate[:, :, :-1].mT.clone(memory_format=torch.contiguous_format),
        None if a.initial_n is None else dstate[:, :, -1].clone(),
    )
