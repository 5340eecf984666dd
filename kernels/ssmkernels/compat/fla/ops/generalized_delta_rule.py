"""``fla.ops.generalized_delta_rule``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.compat._calls import taking
from ssmkernels.compat._fla import Found
from ssmkernels.compat._fla_more import generalized
from ssmkernels.compat.fla._parameters import parameters

__all__ = [
    "chunk_dplr_delta_rule",
    "chunk_iplr_delta_rule",
    "fused_recurrent_dplr_delta_rule",
    "fused_recurrent_iplr_delta_rule",
]


@taking(
    generalized,
    """
        q k v a b gk scale initial_state output_final_state cu_seqlens cu_seqlens_cpu safe_gate chunk_size
        disable_recompute cp_context lower_bound
    """,
    parameters,
)
def chunk_dplr_delta_rule(*args: Any, a: Tensor, b: Tensor, gk: Tensor, **options: Any) -> Found:
    """:func:`ssmkernels.generalized_delta_rule`, S_t = diag(exp(gk_t)) S_{t-1} + b_t (a_tᵀ S_{t-1}) + k_t v_tᵀ.

    Args:
        q, k, a, b, gk: ``(b, l, h, k)``.
        v: ``(b, l, h, v)``.
        scale: of the output; 1/√k if None.
        cu_seqlens_cpu, safe_gate, chunk_size, disable_recompute, lower_bound: not needed; taken for callers' sake.
        cp_context: None; sequences that are cut over processes are refused.
    """


@taking(generalized, "q k v a b gk scale initial_state output_final_state reverse cu_seqlens", parameters)
def fused_recurrent_dplr_delta_rule(*args: Any, a: Tensor, b: Tensor, gk: Tensor, **options: Any) -> Found:
    """As :func:`chunk_dplr_delta_rule`; ``reverse`` is refused."""


@taking(
    generalized,
    "q k v a b scale initial_state output_final_state cu_seqlens cu_seqlens_cpu chunk_size",
    parameters,
)
def chunk_iplr_delta_rule(*args: Any, a: Tensor, b: Tensor, **options: Any) -> Found:
    """As :func:`chunk_dplr_delta_rule`, without decay."""


fused_recurrent_iplr_delta_rule = chunk_iplr_delta_rule
