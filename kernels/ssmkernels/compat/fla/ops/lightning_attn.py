"""``fla.ops.lightning_attn``."""

from __future__ import annotations

from torch import Tensor

from ssmkernels.compat._calls import compatible
from ssmkernels.compat._fla import Found
from ssmkernels.compat._fla_more import lightning

__all__ = ["chunk_lightning_attn", "fused_recurrent_lightning_attn"]


@compatible(lightning)
def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
) -> Found:
    """:func:`ssmkernels.linear_attention` with decays exp(-8/h (1 - layer_idx / num_layers) i) for head i of h."""


@compatible(lightning)
def fused_recurrent_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Found:
    """As :func:`chunk_lightning_attn`; ``reverse`` is refused."""
