"""``fla.ops.rwkv6``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.compat._calls import taking
from ssmkernels.compat._fla import Found
from ssmkernels.compat._fla_more import with_bonus
from ssmkernels.compat.fla._parameters import parameters

__all__ = ["chunk_rwkv6", "fused_recurrent_rwkv6"]


@taking(with_bonus, "r k v w u scale initial_state output_final_state cu_seqlens cu_seqlens_cpu chunk_size", parameters)
def chunk_rwkv6(*args: Any, r: Tensor, w: Tensor, u: Tensor, **options: Any) -> Found:
    """RWKV-6's recurrence, :func:`ssmkernels.linear_attention` with a bonus.

    Args:
        r, k: receptances and keys, ``(b, l, h, k)``.
        v: ``(b, l, h, v)``.
        w: logarithms of the decay, ``(b, l, h, k)``.
        u: the bonus, ``(h, k)``.
        scale: of the output; 1/√k if None.
    """


@taking(with_bonus, "r k v w u scale initial_state output_final_state reverse cu_seqlens", parameters)
def fused_recurrent_rwkv6(*args: Any, r: Tensor, w: Tensor, u: Tensor, **options: Any) -> Found:
    """As :func:`chunk_rwkv6`; ``reverse`` is refused."""
