"""``fla.ops.forgetting_attn``."""

from __future__ import annotations

from torch import Tensor

from ssmkernels.compat._calls import compatible
from ssmkernels.compat._fla_more import softmax

__all__ = ["parallel_forgetting_attn"]


@compatible(softmax)
def parallel_forgetting_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The Forgetting Transformer's attention (Lin et al. 2025): causal :func:`ssmkernels.attention` whose logits decay.

    Args:
        q: ``(b, l, h, k)``.
        k, v: ``(b, l, h_kv, k)`` and ``(b, l, h_kv, v)``.
        g: ``(b, l, h)``, logarithms of decays: to the logit of a key are added those of later tokens, the query's
            included.
        scale: of the products; 1/√k if None.
        window_size: how many keys a query sees, its own included; all if None, and zeros come out if 0.
        cu_seqlens: integers ``(s + 1)``, borders of sequences packed into a batch of one.
    """
