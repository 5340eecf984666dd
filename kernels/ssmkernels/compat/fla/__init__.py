"""flash-linear-attention's functions: its names and its layout, time before heads, on a CPU as well as on a GPU.

Written after flash-linear-attention 0.6.0. Imports change like this::

    fla.ops                                          → ssmkernels.compat.fla.ops
    fla.ops.delta_rule, fla.ops.gla, fla.ops.kda, …  → ssmkernels.compat.fla.ops.delta_rule, …
    fla.modules, fla.modules.convolution, …          → ssmkernels.compat.fla.modules, …

All functions of an op, in chunks or recurrent, compute the same here. Any dtype, any strides and lengths are taken.
Groups of heads of values may share queries and keys in all of them.

Sizes: b batch, l length, g heads of queries and keys, h heads of values (a multiple), k and v channels of a head, s
sequences (b, or as many as ``cu_seqlens`` packs). Every function returns the output ``(b, l, h, v)`` in v's dtype, and
the state after the last token, float32 (float64 for float64 input), or None without ``output_final_state``. The states
are ``(s, h, k, v)``, or ``(s, h, v, k)`` with ``state_v_first``. ``chunk_size`` has no effect; ``reverse`` and
unknown keywords are refused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.compat._calls import compatible
from ssmkernels.compat._fla import delta, linear

__version__ = "0.6.0"

__all__ = [
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_gla",
    "chunk_kda",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "fused_chunk_delta_rule",
    "fused_chunk_gla",
    "fused_chunk_linear_attn",
    "fused_chunk_retention",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gla",
    "fused_recurrent_kda",
    "fused_recurrent_linear_attn",
    "fused_recurrent_retention",
    "fused_recurrent_simple_gla",
]

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


@compatible(linear)
def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = None,
) -> Found:
    """:func:`ssmkernels.linear_attention` with a decay for each key channel, ``g (b, l, h, k)`` in logarithms."""


@compatible(linear)
def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Found:
    """As :func:`chunk_gla`, with its decays as ``gk``; ``gv`` and ``reverse`` are refused."""


@compatible(linear)
def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = None,
) -> Found:
    """:func:`ssmkernels.linear_attention` with a decay for each head: ``g (b, l, h)`` and ``g_gamma (h)``, added."""


@compatible(linear)
def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Found:
    """As :func:`chunk_simple_gla`; ``reverse`` is refused."""


@compatible(linear)
def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    reverse: bool = False,
    state_v_first: bool = False,
    chunk_size: int | None = None,
) -> Found:
    """:func:`ssmkernels.linear_attention` with RetNet's decays, 1 - 2^(-5 - i) for head i."""


@compatible(linear)
def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
    *,
    reverse: bool = False,
    chunk_size: int | None = None,
) -> Found:
    """:func:`ssmkernels.linear_attention` without decay.

    With ``normalize`` the output is divided by the sum of the products of its query and all keys so far, plus 1e-10; a
    state is then a tuple: the matrix, and the sum of keys ``(s, 1, g, k)``.
    """


fused_chunk_delta_rule, fused_recurrent_delta_rule = chunk_delta_rule, chunk_delta_rule
fused_chunk_gla = chunk_gla
fused_chunk_retention = fused_recurrent_retention = chunk_retention
fused_chunk_linear_attn = fused_recurrent_linear_attn = chunk_linear_attn
