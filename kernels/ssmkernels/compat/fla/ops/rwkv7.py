"""``fla.ops.rwkv7``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.compat._calls import compatible
from ssmkernels.compat._fla import Found
from ssmkernels.compat._fla_more import generalized

__all__ = ["chunk_rwkv7", "fused_mul_recurrent_rwkv7", "fused_recurrent_rwkv7"]


@compatible(generalized)
def chunk_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False,
    chunk_size: int | None = None,
    disable_recompute: bool = False,
    cp_context: Any = None,
    lower_bound: float | None = None,
) -> Found:
    """RWKV-7's recurrence, :func:`ssmkernels.generalized_delta_rule`.

    Args:
        r, k, a, b: receptances, keys, and the directions that are read and written, ``(b, l, h, k)``.
        w: logarithms of the decay, ``(b, l, h, k)``.
        v: ``(b, l, h, v)``.
        scale: of the output.
        cu_seqlens_cpu, safe_gate, chunk_size, disable_recompute, lower_bound: not needed; taken for callers' sake.
        cp_context: None; sequences that are cut over processes are refused.
    """


@compatible(generalized)
def fused_recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Found:
    """As :func:`chunk_rwkv7`, with a scale of 1/√k if it is None."""


@compatible(generalized)
def fused_mul_recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    a: Tensor,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Found:
    """As :func:`chunk_rwkv7` with a = -kk and b = kk · a, in the names of here; ``reverse`` is refused."""
