"""The functions of fla that are :func:`ssmkernels.linear_attention`: with and without decay, and retention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.compat._calls import taking
from ssmkernels.compat._fla import linear
from ssmkernels.compat.fla._parameters import parameters

Found = tuple[Tensor, Any]


@taking(
    linear,
    "q k v g scale initial_state output_final_state state_v_first cu_seqlens cu_seqlens_cpu chunk_size",
    parameters,
)
def chunk_gla(*args: Any, g: Tensor, **options: Any) -> Found:
    """:func:`ssmkernels.linear_attention` with a decay for each key channel, ``g (b, l, h, k)`` in logarithms."""


@taking(linear, "q k v gk gv scale initial_state output_final_state reverse state_v_first cu_seqlens", parameters)
def fused_recurrent_gla(*args: Any, **options: Any) -> Found:
    """As :func:`chunk_gla`, with its decays as ``gk``; ``gv`` and ``reverse`` are refused."""


@taking(
    linear,
    "q k v g g_gamma scale initial_state output_final_state state_v_first cu_seqlens cu_seqlens_cpu chunk_size",
    parameters,
)
def chunk_simple_gla(*args: Any, **options: Any) -> Found:
    """:func:`ssmkernels.linear_attention` with a decay for each head: ``g (b, l, h)`` and ``g_gamma (h)``, added."""


@taking(linear, "q k v g g_gamma scale initial_state output_final_state reverse state_v_first cu_seqlens", parameters)
def fused_recurrent_simple_gla(*args: Any, **options: Any) -> Found:
    """As :func:`chunk_simple_gla`; ``reverse`` is refused."""


@taking(
    linear,
    "q k v scale initial_state output_final_state cu_seqlens * reverse state_v_first chunk_size",
    parameters,
)
def chunk_retention(*args: Any, **options: Any) -> Found:
    """:func:`ssmkernels.linear_attention` with RetNet's decays, 1 - 2^(-5 - i) for head i."""


@taking(linear, "q k v scale initial_state output_final_state normalize cu_seqlens * reverse chunk_size", parameters)
def chunk_linear_attn(
    *args: Any, initial_state: Tensor | tuple[Tensor, Tensor] | None = None, normalize: bool = True, **options: Any
) -> Found:
    """:func:`ssmkernels.linear_attention` without decay.

    With ``normalize`` the output is divided by the sum of the products of its query and all keys so far, plus 1e-10; a
    state is then a tuple: the matrix, and the sum of keys ``(s, 1, g, k)``.
    """
