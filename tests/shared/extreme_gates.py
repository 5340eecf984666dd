"""Arguments of recurrences whose gates are at their ends, and what implementations make of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ssmkernels

WALLS = (0.0, -1e-4, -30.0, -100.0, -1e4, -math.inf)
EPS = torch.finfo(torch.float32).eps

Randn = Callable[..., Tensor]  # float64 of a shape


def with_walls(like: Tensor, value: float | None, walls: tuple[float, ...] = WALLS) -> Tensor:
    """``value`` everywhere; None: all ``walls`` in turn, between numbers of ``like``."""
    if value is not None:
        return torch.full_like(like, value)
    like = like.clone()
    flat = like.view(-1)
    for i, wall in enumerate(walls):
        flat[i :: 2 * len(walls) + 1] = wall
    return like


def matrix_state(
    randn: Randn, op: str, decay: float | None, beta: float, norm: float, *, shape: tuple[int, ...], per_key: bool
) -> dict[str, Tensor]:
    """By op, log decay (one for all tokens, or None for all of ``WALLS`` and others in turn), β and norm of keys.

    Args:
        shape: b, l, h, k and v.
        per_key: a decay for each key channel.
    """
    b, l, h, k, v = shape
    log_decay = with_walls(-randn(b, l, h, *([k] if per_key else [])).abs(), decay)
    made = {"q": randn(b, l, h, k), "k": norm * F.normalize(randn(b, l, h, k), dim=-1), "v": randn(b, l, h, v)}
    if op == "delta_rule":
        made["beta"] = torch.full((b, l, h), beta, dtype=torch.float64)
    if op == "generalized_delta_rule":
        along = F.normalize(randn(b, l, h, k), dim=-1)
        made |= {"a": -beta * along, "b": along}
    return made | {"log_decay": log_decay, "initial_state": randn(b, h, k, v)}


def matrix_memory(randn: Randn, f: float | None, i: float, *, length: int) -> dict[str, Tensor]:
    """``mlstm``, with this forget gate at all tokens or all of ``WALLS`` in turn; the input gates have a scale of i."""
    b, l, h, k, v = 1, length, 1, 3, 2
    made = {"q": randn(b, l, h, k), "k": randn(b, l, h, k), "v": randn(b, l, h, v)}
    made |= {"i": i * randn(b, l, h), "f": with_walls(randn(b, l, h), f)}
    return made | {"initial_C": randn(b, h, k, v), "initial_n": randn(b, h, k), "initial_m": randn(b, h)}


def scan(randn: Randn, op: str, rate: float, *, length: int) -> dict[str, Tensor]:
    """``ssd`` or ``selective_scan`` with this rate, and steps from 0 to 1e30; only of 0.5 for a rate beyond 1e30.

    For a step of 0 the gradient of the step is a multiple of the rate.
    """
    b, l, d, n = 1, length, 3, 2
    steps = with_walls(randn(b, l, d).abs(), 0.5 if rate < -1e30 else None, (0.0, 1e-4, 30.0, 100.0, 1e4, 1e30))
    maps = {"B": randn(b, l, 1, n), "C": randn(b, l, 1, n)}
    if op == "ssd":
        made = {"x": randn(b, l, d, 2), "dt": steps, "A": torch.full((d,), rate, dtype=torch.float64)}
        return made | maps | {"initial_state": randn(b, d, 2, n)}
    made = {"u": randn(b, l, d), "delta": steps, "A": torch.full((d, n), rate, dtype=torch.float64)}
    return made | maps | {"initial_state": randn(b, d, n)}


def results(op: str, implementation: str, arguments: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs by their number, and gradients by the arguments' names, in float64."""
    leaves = {name: a.to(dtype, copy=True).requires_grad_() for name, a in arguments.items()}
    public: Any = getattr(ssmkernels, op)
    call = getattr(public, "unbundled", public)
    outputs = call(**leaves, return_final_state=True, implementation=implementation)
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), given)
    found = {f"output {i}": o for i, o in enumerate(outputs)} | dict(zip(leaves, gradients, strict=True))
    return {name: t.detach().double() for name, t in found.items()}


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def assert_as_exact(op: str, implementation: str, arguments: dict[str, Tensor], double: bool = False) -> None:
    """In float32 as near to the reference in float64 as the reference in float32 is, nearly; and in float64 equal."""
    made = {name: a.float() for name, a in arguments.items()}
    exact, peer = (results(op, "reference", made, dtype) for dtype in (torch.float64, torch.float32))
    found = results(op, implementation, made, torch.float32)
    for name, truth in exact.items():
        assert found[name].isfinite().all(), name
        assert error(found[name], truth) <= 4 * error(peer[name], truth) + 16 * EPS, name
    if double:
        for name, actual in results(op, implementation, made, torch.float64).items():
            assert error(actual, exact[name]) < 1e-10, name
