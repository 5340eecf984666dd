"""The functions of fla that are :func:`ssmkernels.linear_attention`: with and without decay, and retention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.compat._calls import compatible
from ssmkernels.compat._fla import linear

Found = tuple[Tensor, Any]


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
