"""``fla.ops.rwkv6``."""

from __future__ import annotations

from torch import Tensor

from ssmkernels.compat._calls import compatible
from ssmkernels.compat._fla import Found
from ssmkernels.compat._fla_more import with_bonus

__all__ = ["chunk_rwkv6", "fused_recurrent_rwkv6"]


@compatible(with_bonus)
def chunk_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = None,
) -> Found:
    """RWKV-6's recurrence, :func:`ssmkernels.linear_attention` with a bonus.

    Args:
        r, k: receptances and keys, ``(b, l, h, k)``.
        v: ``(b, l, h, v)``.
        w: logarithms of the decay, ``(b, l, h, k)``.
        u: the bonus, ``(h, k)``.
        scale: of the output; 1/√k if None.
    """


@compatible(with_bonus)
def fused_recurrent_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Found:
    """As :func:`chunk_rwkv6`; ``reverse`` is refused."""
