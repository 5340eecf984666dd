"""The functions of fla that are :func:`ssmkernels.delta_rule`: the delta rule, gated or not, and KDA."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.compat._calls import taking
from ssmkernels.compat._fla import delta
from ssmkernels.compat.fla._parameters import parameters

Found = tuple[Tensor, Any]


@taking(
    delta,
    "q k v beta scale initial_state output_final_state use_qk_l2norm_in_kernel cu_seqlens cu_seqlens_cpu chunk_size",
    parameters,
)
def chunk_delta_rule(*args: Any, **options: Any) -> Found:
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


@taking(
    delta,
    """
        q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel
        use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first cu_seqlens cu_seqlens_cpu chunk_indices
        cp_context use_gate_in_kernel A_log dt_bias chunk_size
    """,
    parameters,
)
def chunk_gated_delta_rule(*args: Any, **options: Any) -> Found:
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


@taking(
    delta,
    """
        q k v g gk gv beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_gate_in_kernel
        A_log dt_bias use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first cu_seqlens
    """,
    parameters,
)
def fused_recurrent_gated_delta_rule(*args: Any, **options: Any) -> Found:
    """As :func:`chunk_gated_delta_rule`, also with decays ``gk (b, l, h, k)`` of key channels; ``gv`` is refused."""


@taking(
    delta,
    """
        q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_gate_in_kernel
        use_beta_sigmoid_in_kernel allow_neg_eigval safe_gate lower_bound disable_recompute state_v_first
        cu_seqlens cu_seqlens_cpu cp_context A_log dt_bias chunk_size
    """,
    parameters,
)
def chunk_kda(*args: Any, g: Tensor, **options: Any) -> Found:
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


@taking(
    delta,
    """
        q k v g beta A_log dt_bias scale initial_state output_final_state use_qk_l2norm_in_kernel
        use_gate_in_kernel use_beta_sigmoid_in_kernel allow_neg_eigval lower_bound state_v_first cu_seqlens
    """,
    parameters,
)
def fused_recurrent_kda(*args: Any, g: Tensor, **options: Any) -> Found:
    """As :func:`chunk_kda`."""
