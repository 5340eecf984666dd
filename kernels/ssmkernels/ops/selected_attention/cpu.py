"""Attention to selected blocks in the native CPU library: a block meets all who selected it (``cpu_lists.h``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.native import missing
from ssmkernels.ops.attention import native
from ssmkernels.ops.attention.native import SAVES, empty, unsupported
from ssmkernels.ops.selected_attention import tiled

__all__ = ["SAVES", "backward", "checked", "empty", "forward", "missing", "unsupported"]

checked = tiled.checked


def forward(a: Any, save: bool) -> tuple[Tensor, ...]:
    return native.forward("selected_attention", a, save, **_selected(a))


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor]:
    return native.backward("selected_attention_backward", a, saved, grads, **_selected(a))


def _selected(a: Any) -> dict[str, Any]:
    blocks, size = a.blocks.contiguous(), a.block_size
    g, n = blocks.shape[2:]
    return {"g": g, "keys": min(a.k.shape[1], n * size), "blocks": blocks, "n": n, "block_size": size}
