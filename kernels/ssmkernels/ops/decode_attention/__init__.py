"""Attention of the newest tokens over a cache, whole or in pages (PagedAttention, arXiv 2309.06180)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.declare import op
from ssmkernels.core.plain import readable
from ssmkernels.core.validate import check_range, check_shapes
from ssmkernels.ops.attention._arguments import bounds, check_logits, scale_of

__all__ = ["decode_attention"]


def _check(
    name: str,
    sizes: dict[str, int],
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    softcap: float,
    num_splits: int | None,
    **others: Any,
) -> None:
    """Which of its two shapes a cache must have, heads, and constants."""
    rows = "s m" if block_table is None else "pages page_size"
    caches = {"k_cache": (k_cache, f"{rows} h_kv k"), "v_cache": (v_cache, f"{rows} h_kv v")}
    check_shapes(name, caches, **{letter: sizes[letter] for letter in ("s", "h_kv", "k")})
    check_logits(name, sizes, softcap)
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"{name}: `num_splits` must be at least 1, or None; got {num_splits}")
    check_range(name, 1, num_splits=num_splits)


def _lower(
    lengths: Tensor,
    block_table: Tensor | None,
    window: tuple[int, int] | None,
    scale: float | None,
    softcap: float,
    **others: Any,
) -> dict[str, Any]:
    """What implementations take: the window's left bound, a scale, and lengths and pages that exist."""
    others["left"], _ = bounds("decode_attention", True, window)
    if readable(lengths):
        lengths, block_table = checked_places(lengths, block_table, others["k_cache"])
    others |= {"lengths": lengths, "block_table": block_table}
    return {**others, "scale": scale_of(others["q"], scale), "softcap": float(softcap)}


def checked_places(lengths: Tensor, block_table: Tensor | None, k_cache: Tensor) -> tuple[Tensor, Tensor | None]:
    """Copies of both, whose tokens all lie within the cache: what is checked stays so whatever another thread writes.

    It reads them, which on a GPU would mean to wait for it.

    Raises:
        ValueError: a length beyond the cache, or a page that does not exist.
    """
    lengths, block_table = lengths.clone(), None if block_table is None else block_table.clone()
    name = "decode_attention"
    pages, size = k_cache.shape[:2]
    room = size if block_table is None else block_table.shape[1] * size
    for i, length in enumerate(lengths.tolist()):
        if not 0 <= length <= room:
            raise ValueError(f"{name}: `lengths` must lie between 0 and the cache's {room}; got {length} at {i}")
    if block_table is None or block_table.numel() == 0:
        return lengths, block_table
    low, high = (int(page) for page in block_table.aminmax())
    if low < 0 or high >= pages:  # which is an error only where the entry is used
        used = torch.arange(block_table.shape[1]) * size < lengths[:, None]
        wrong = (used & ((block_table < 0) | (block_table >= pages))).nonzero().tolist()
        if wrong:
            i, j = wrong[0]
            page = int(block_table[i, j])
            raise ValueError(f"{name}: `block_table` must name pages 0 to {pages - 1}; got {page} in row {i}")
    return lengths, block_table


@op(
    shapes="""
        q: s l h k
        k_cache: s m h_kv k | pages page_size h_kv k
        v_cache: s m h_kv v | pages page_size h_kv v
        lengths: s
        block_table: s blocks
        alibi_slopes sinks: h
    """,
    returns="out: s l h v; lse: s h l: sums if return_lse",
    wide="alibi_slopes sinks",
    int32="lengths block_table",
    check=_check,
    takes="""
        q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, block_table: Tensor | None, left: int,
        scale: float, softcap: float, alibi_slopes: Tensor | None, sinks: Tensor | None, num_splits: int | None,
        return_lse: bool
    """,
    lower=_lower,
    implementations=("triton", "cpu", "sdpa", "reference"),
)
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of each sequence's last few tokens, whose keys and values the cache holds already.

    Query i of l stands at position ``lengths - l + i`` of its sequence and sees the positions up to its
    own. What the cache holds from ``lengths`` on does not reach the result, be it NaN. Everything else is
    as in :func:`~ssmkernels.attention`.

    Sizes: s sequences, l queries of each (one, or a few), m positions of a cache, h heads, h_kv heads of
    keys and values (h a multiple of it), k and v their head dims.

    Args:
        q: queries, ``(s, l, h, k)``.
        k_cache, v_cache: ``(s, m, h_kv, k)`` and ``(s, m, h_kv, v)``; or, with ``block_table``, pages that
            all sequences share, ``(pages, page_size, h_kv, k)`` and ``(pages, page_size, h_kv, v)``.
        lengths: int32 ``(s)``, tokens of each sequence in the cache, the new ones included. A query whose
            position is negative sees nothing.
        block_table: int32 ``(s, blocks)``: position t of sequence i lies in page
            ``block_table[i, t // page_size]``, at ``t % page_size``. Entries past its last page may be
            anything.
        window: ``(left, right)``, -1 for no bound; right has no effect, as no query sees past its position.
        scale: of the products; 1/√k if None.
        softcap: bounds the scaled products smoothly; 0 for none.
        alibi_slopes: ``(h)``, linear penalties on distance.
        sinks: ``(h)``, one more logit per head that has no value.
        num_splits: into how many parts a kernel divides the cache, to use a whole GPU; the kernel chooses
            if None. It does not change the result beyond rounding; ``sdpa`` and ``reference`` ignore it.
        return_lse: whether to return the log-sum-exp as well.

    Returns:
        ``(s, l, h, v)`` in q's dtype; with ``return_lse`` also lse ``(s, h, l)``, float32 (float64 for
        float64 input).
    """
