"""``fla.ops.hgrn``."""

from __future__ import annotations

from torch import Tensor

from ssmkernels.compat._calls import compatible
from ssmkernels.compat._fla_more import gated

__all__ = ["chunk_hgrn", "fused_recurrent_hgrn"]


@compatible(gated)
def fused_recurrent_hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`ssmkernels.linear_recurrence`, h_t = exp(g_t) h_{t-1} + x_t.

    Args:
        x, g: ``(b, l, d)``.
        initial_state: ``(s, d)``.
    """


@compatible(gated)
def chunk_hgrn(
    x: Tensor, g: Tensor, initial_state: Tensor | None = None, output_final_state: bool = False
) -> tuple[Tensor, Tensor | None]:
    """As :func:`fused_recurrent_hgrn`."""
