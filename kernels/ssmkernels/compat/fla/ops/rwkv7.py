"""``fla.ops.rwkv7``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.compat._calls import taking
from ssmkernels.compat._fla import Found
from ssmkernels.compat._fla_more import generalized
from ssmkernels.compat.fla._parameters import parameters

__all__ = ["chunk_rwkv7", "fused_mul_recurrent_rwkv7", "fused_recurrent_rwkv7"]


@taking(
    generalized,
    """
        r w k v a b scale initial_state output_final_state cu_seqlens cu_seqlens_cpu safe_gate chunk_size
        disable_recompute cp_context lower_bound
    """,
    parameters,
)
def chunk_rwkv7(*args: Any, r: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, **options: Any) -> Found:
    """RWKV-7's recurrence, :func:`ssmkernels.generalized_delta_rule`.

    Args:
        r, k, a, b: receptances, keys, and the directions that are read and written, ``(b, l, h, k)``.
        w: logarithms of the decay, ``(b, l, h, k)``.
        v: ``(b, l, h, v)``.
        scale: of the output.
        cu_seqlens_cpu, safe_gate, chunk_size, disable_recompute, lower_bound: not needed; taken for callers' sake.
        cp_context: None; sequences that are cut over processes are refused.
    """


@taking(generalized, "r w k v a b scale initial_state output_final_state cu_seqlens", parameters)
def fused_recurrent_rwkv7(
    *args: Any, r: Tensor, w: Tensor, a: Tensor, b: Tensor, output_final_state: bool = True, **options: Any
) -> Found:
    """As :func:`chunk_rwkv7`, with a scale of 1/√k if it is None."""


@taking(generalized, "r w k v kk a scale initial_state output_final_state reverse cu_seqlens", parameters)
def fused_mul_recurrent_rwkv7(
    *args: Any, r: Tensor, w: Tensor, kk: Tensor, a: Tensor, scale: float | None = 1.0, **options: Any
) -> Found:
    """As :func:`chunk_rwkv7` with a = -kk and b = kk · a, in the names of here; ``reverse`` is refused."""
