"""``fla.ops.lightning_attn``."""

from __future__ import annotations

from typing import Any

from ssmkernels.compat._calls import taking
from ssmkernels.compat._fla import Found
from ssmkernels.compat._fla_more import lightning
from ssmkernels.compat.fla._parameters import parameters

__all__ = ["chunk_lightning_attn", "fused_recurrent_lightning_attn"]


@taking(
    lightning,
    "q k v layer_idx num_layers scale initial_state output_final_state cu_seqlens chunk_size",
    parameters,
)
def chunk_lightning_attn(*args: Any, layer_idx: int, num_layers: int, **options: Any) -> Found:
    """:func:`ssmkernels.linear_attention` with decays exp(-8/h (1 - layer_idx / num_layers) i) for head i of h."""


@taking(lightning, "q k v layer_idx num_layers scale initial_state output_final_state reverse cu_seqlens", parameters)
def fused_recurrent_lightning_attn(*args: Any, layer_idx: int, num_layers: int, **options: Any) -> Found:
    """As :func:`chunk_lightning_attn`; ``reverse`` is refused."""
