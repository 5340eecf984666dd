"""``fla.ops.generalized_delta_rule``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.compat._calls import compatible
from ssmkernels.compat._fla import Found
from ssmkernels.compat._fla_more import generalized

__all__ = [
    "chunk_dplr_delta_rule",
    "chunk_iplr_delta_rule",
    "fused_recurrent_dplr_delta_rule",
    "fused_recurrent_iplr_delta_rule",
]


@compatible(generalized)
def chunk_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor,
    scale: float | None = None,
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
    """:func:`ssmkernels.generalized_delta_rule`, S_t = diag(exp(gk_t)) S_{t-1} + b_t (a_tᵀ S_{t-1}) + k_t v_tᵀ.

    Args:
        q, k, a, b, gk: ``(b, l, h, k)``.
        v: ``(b, l, h, v)``.
        scale: of the output; 1/√k if None.
        cu_seqlens_cpu, safe_gate, chunk_size, disable_recompute, lower_bound: not needed; taken for callers' sake.
        cp_context: None; sequences that are cut over processes are refused.
    """


@compatible(generalized)
def fused_recurrent_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Found:
    """As :func:`chunk_dplr_delta_rule`; ``reverse`` is refused."""


@compatible(generalized)
def chunk_iplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = None,
) -> Found:
    """As :func:`chunk_dplr_delta_rule`, without decay."""


fused_recurrent_iplr_delta_rule = chunk_iplr_delta_rule
