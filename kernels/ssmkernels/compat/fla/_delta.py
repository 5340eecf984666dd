"""The functions of fla that are :func:`ssmkernels.delta_rule`: the delta rule, gated or not, and KDA."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.compat._calls import compatible
from ssmkernels.compat._fla import delta

Found = tuple[Tensor, Any]


@compatible(delta)
def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = None,
) -> Found:
    """:func:`ssmkernels.delta_rule` without decay.

    Args:
        q, k: ``(b, l, g, k)``.
        v: ``(b, l, h, v)``.
        beta: ``(b, l, h)``; 1 if None.
        scale: of the output; 1/√k if None.
        use_qk_l2norm_in_kernel: whether q and k are divided by √(Σ x² + 1e-6) over k first.
        cu_seqlens: integers ``(s + 1)``, borders of sequences packed into a batch of one.
        cu_seqlens_cpu: not needed; taken for the sake of callers.
    """


@compatible(delta)
def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int | None = None,
) -> Found:
    """:func:`ssmkernels.delta_rule` with a decay for each head.

    Args:
        q, k, v, beta, scale, use_qk_l2norm_in_kernel, cu_seqlens: as :func:`chunk_delta_rule`.
        g: logarithms of the decay, ``(b, l, h)``.
        use_beta_sigmoid_in_kernel: whether β passes through σ first; times 2 with ``allow_neg_eigval``.
        use_gate_in_kernel: whether the logarithms are -exp(A_log) softplus(g + dt_bias).
        A_log, dt_bias: ``(h)``.
        cu_seqlens_cpu, chunk_indices: not needed; taken for the sake of callers.
        cp_context: None; sequences that are cut over processes are refused.
    """


@compatible(delta)
def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Found:
    """As :func:`chunk_gated_delta_rule`, also with decays ``gk (b, l, h, k)`` of key channels; ``gv`` is refused."""


@compatible(delta)
def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: Any = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int | None = None,
) -> Found:
    """:func:`ssmkernels.delta_rule` with a decay for each key channel.

    Args:
        q, k, v, beta, scale, use_qk_l2norm_in_kernel, cu_seqlens: as :func:`chunk_delta_rule`.
        g: logarithms of the decay, ``(b, l, h, k)``.
        use_gate_in_kernel: whether they are -exp(A_log) softplus(g + dt_bias), or, with ``lower_bound``, that times
            σ(exp(A_log) (g + dt_bias)).
        A_log: ``(h)``, any number of axes of 1 around it.
        dt_bias: ``(h k)``, likewise.
        safe_gate, disable_recompute, cu_seqlens_cpu: not needed; taken for the sake of callers.
        use_beta_sigmoid_in_kernel, allow_neg_eigval, cp_context: as :func:`chunk_gated_delta_rule`.
    """


@compatible(delta)
def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Found:
    """As :func:`chunk_kda`."""
