"""``fla.ops.attn``."""

from __future__ import annotations

from torch import Tensor

from ssmkernels.compat._calls import compatible
from ssmkernels.compat._fla_more import softmax

__all__ = ["parallel_attn"]


@compatible(softmax)
def parallel_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    *,
    sink_bias: Tensor | None = None,
) -> Tensor:
    """Causal :func:`ssmkernels.attention`.

    Args:
        q: ``(b, l, h, k)``.
        k, v: ``(b, l, h_kv, k)`` and ``(b, l, h_kv, v)``.
        g: ``(b, l, h)``, logarithms of decays: to the logit of a key are added those of later tokens, the query's
            included. No decays if None.
        scale: of the products; 1/√k if None.
        window_size: how many keys a query sees, its own included; all if None, and zeros come out if 0.
        cu_seqlens: integers ``(s + 1)``, borders of sequences packed into a batch of one.
        chunk_indices: not needed; taken for the sake of callers.
        sink_bias: ``(h)``, one more logit for each head, which has no value.
    """
