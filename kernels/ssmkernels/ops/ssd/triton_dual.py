"""The state-space dual on given decays in Triton: what ``dual`` of ``tiled.py`` gives, with a gradient of its own."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels.core.gradient import with_gradient
from ssmkernels.core.triton_support import on_device_of
from ssmkernels.ops.ssd import tiled
from ssmkernels.ops.ssd.triton_backward import backward
from ssmkernels.ops.ssd.triton_launch import Chunks


class Call(NamedTuple):
    """The arguments of ``ssd`` whose ``dt`` are the logarithms of the decays, and whose inputs count as they are."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    initial_state: Tensor | None
    chunk_size: int | None
    cu_seqlens: Tensor | None
    A: None = None
    D: None = None
    z: None = None
    dt_bias: None = None
    dt_softplus: bool = False
    dt_limit: tuple[float, float] = (-math.inf, math.inf)


def _forward(a: Call) -> tuple[Tensor, Tensor]:
    (heads, p), n = a.x.shape[2:], a.B.shape[3]
    sequences = a.x.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    y, final_state = torch.empty_like(a.x), a.x.new_empty((sequences, heads, p, n), dtype=torch.float32)
    with on_device_of(a.x):
        Chunks(a, final_state).outputs(y, None, None, None)
    return y, final_state


def _backward(a: Call, gradients: tuple[Tensor, Tensor], _: set[str]) -> dict[str, Any]:
    return backward(a, None, SimpleNamespace(y=gradients[0], final_state=gradients[1]))


def _again(a: Call) -> tuple[Tensor, Tensor]:
    return tiled.dual(a.x, a.dt, a.B, a.C, a.initial_state, a.chunk_size, a.cu_seqlens)


_node = with_gradient(_forward, _backward, _again)


def dual(
    X: Tensor, a: Tensor, B: Tensor, C: Tensor, S: Tensor | None, size: int | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """X (b l h p), log decays a (b l h), B, C (b l g n), S (s h p n) → Y (b l h p) and the final S."""
    return _node(Call(X.contiguous(), a, B, C, S, size, cu_seqlens))
