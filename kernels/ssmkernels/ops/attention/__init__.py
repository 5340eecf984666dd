"""Softmax attention (Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1), with language models' options."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.core.block_mask import MEMBERS
from ssmkernels.core.declare import op
from ssmkernels.core.validate import check_borders, check_cu_seqlens, copied
from ssmkernels.masks import BlockMask
from ssmkernels.ops.attention._arguments import (
    bounds,
    check_block_mask,
    check_logits,
    check_positions,
    placed,
    scale_of,
)
from ssmkernels.ops.attention.merge import merge_attention

__all__ = ["attention", "merge_attention"]


def _check(
    name: str,
    sizes: dict[str, int],
    k: Tensor,
    softcap: float,
    block_mask: Any,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    **others: Any,
) -> None:
    """Heads, constants, the mask, positions, and how many sequences queries and keys are packed from."""
    check_logits(name, sizes, softcap)
    check_positions(name, q_positions, k_positions)
    check_block_mask(name, block_mask, sizes, k.device)
    if cu_seqlens_k is None:
        if cu_seqlens is not None and sizes["l"] != sizes["m"]:
            raise ValueError(
                f"{name}: without `cu_seqlens_k` the packed `k` must be as long as `q`, {sizes['l']}; got {sizes['m']}"
            )
    elif cu_seqlens is None:
        raise ValueError(f"{name}: `cu_seqlens_k` needs `cu_seqlens`, the borders of the queries; got None")
    elif check_cu_seqlens(name, cu_seqlens_k, k, "cu_seqlens_k", values=False) != sizes["s"]:
        raise ValueError(
            f"{name}: `cu_seqlens_k` must pack {sizes['s']} sequences, as `cu_seqlens` does; "
            f"got {cu_seqlens_k.shape[0] - 1}"
        )


def _lower(
    causal: bool,
    window: tuple[int, int] | None,
    scale: float | None,
    softcap: float,
    block_mask: BlockMask | None,
    cu_seqlens_k: Tensor | None,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    **others: Any,
) -> dict[str, Any]:
    """What implementations take: a window without ``causal``, a scale, a mask's tensors, borders of the keys, and
    positions in int32."""
    left, right = bounds("attention", causal, window)
    cu_seqlens_k = copied(cu_seqlens_k)
    if cu_seqlens_k is None:
        cu_seqlens_k = others["cu_seqlens"]
    else:
        check_borders("attention", cu_seqlens_k, others["k"].shape[1], "cu_seqlens_k")
    members = {f"block_{member}": None if block_mask is None else getattr(block_mask, member) for member in MEMBERS}
    others |= {"left": left, "right": right, "scale": scale_of(others["q"], scale), "softcap": float(softcap)}
    others |= {
        "q_positions": placed("attention", "q_positions", q_positions),
        "k_positions": placed("attention", "k_positions", k_positions),
    }
    return {**others, **members, "cu_seqlens_k": cu_seqlens_k}


@op(
    shapes="""
        q: b l h k
        k: b m h_kv k
        v: b m h_kv v
        alibi_slopes sinks: h
        q_positions: b l
        k_positions: b m
    """,
    returns="out: b l h v; lse: b h l: sums if return_lse",
    wide="alibi_slopes sinks",
    own="q_positions k_positions",
    check=_check,
    takes="""
        q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None, sinks: Tensor | None,
        left: int, right: int, scale: float, softcap: float,
        block_offsets: Tensor | None, block_columns: Tensor | None,
        block_patterns: Tensor | None, block_bits: Tensor | None,
        cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None,
        q_positions: Tensor | None, k_positions: Tensor | None, return_lse: bool
    """,
    lower=_lower,
    implementations=("sdpa", "flash_attn", "triton", "cpu", "tiled", "reference"),
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    block_mask: BlockMask | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Each query takes the mean of the values, weighted by the softmax of its products with the keys.

    Query i stands at position p_i and key j at position r_j. Without ``q_positions`` and ``k_positions`` both are
    aligned at their ends: p_i = i + m - l and r_j = j. With the logits s_ij = scale · q_i · k_j::

        s_ij ← softcap · tanh(s_ij / softcap)    where softcap > 0
        s_ij ← s_ij - slope_h · |p_i - r_j|      with alibi_slopes
        s_ij ← -∞                                where r_j is outside of the window, or r_j > p_i and causal,
                                                 or the block mask hides (i, j)
        lse_i = log(Σ_j exp(s_ij) + exp(sink_h)),   out_i = Σ_j exp(s_ij - lse_i) v_j

    Sizes: b batch, l queries, m keys, h heads, h_kv heads of keys and values (h a multiple of it; query heads
    0 … h/h_kv - 1 share the first), k and v their head dims, s sequences that ``cu_seqlens`` packs.

    Args:
        q: queries, ``(b, l, h, k)``.
        k: keys, ``(b, m, h_kv, k)``.
        v: values, ``(b, m, h_kv, v)``.
        causal: no query sees a key after its own position.
        window: ``(left, right)``: a query sees the keys at p - left to p + right, both inclusive; -1 for no
            bound. With ``causal`` the right bound is 0.
        scale: of the products; 1/√k if None.
        softcap: bounds the scaled products smoothly to ± softcap (Gemma 2, arXiv 2408.00118); 0 for none.
        alibi_slopes: ``(h)``, linear penalties on distance (ALiBi, arXiv 2108.12409).
        sinks: ``(h)``, one more logit per head that takes weight and has no value (gpt-oss).
        block_mask: one more condition on which keys a query sees, made by ``ssmkernels.masks``; for all heads
            alike or for each its own. Its indices are those of ``q`` and ``k`` themselves: with ``cu_seqlens``
            too they count over all sequences.
        cu_seqlens: int32 ``(s + 1)``, borders of sequences packed one after another in a batch of one.
            Queries see the keys of their own sequence.
        cu_seqlens_k: the same for keys and values, where their lengths differ; as for the queries if None.
        q_positions: int32 or int64 ``(b, l)``, the queries' own positions, from -2³⁰ to 2³⁰ - 1, in any order and
            with gaps. Causal masks, windows and ALiBi go by them, so that tokens may come sorted by bucket, or with
            some left out (arXiv 2306.01160). Only together with ``k_positions``.
        k_positions: the keys', ``(b, m)`` likewise. Tiles whose least and greatest positions show that nothing in
            them is visible are passed over.
        return_lse: whether to return the log-sum-exp as well.

    Returns:
        ``(b, l, h, v)`` in q's dtype; with ``return_lse`` also lse ``(b, h, l)``, the natural logarithm,
        over the keys and the sink alike, float32 (float64 for float64 input). A query that sees no key
        gives 0 with gradients of 0, and an lse of -∞ (its sink, where there is one). NaN or infinity at a key
        or value changes no row that does not see it; docs/attention.md gives the limits.
    """
