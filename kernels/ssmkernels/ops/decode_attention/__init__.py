"""Attention of the newest tokens over a cache, whole or in pages (PagedAttention, arXiv 2309.06180)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.core.dispatch import Op
from ssmkernels.core.plain import readable
from ssmkernels.core.validate import check_dtypes, check_options, check_range, check_same_dtype, check_shapes, precision
from ssmkernels.ops.attention._arguments import bounds, check_logits

__all__ = ["decode_attention"]


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
        implementation: force one by name; the fastest that can run this call if None.

    Returns:
        ``(s, l, h, v)`` in q's dtype; with ``return_lse`` also lse ``(s, h, l)``, float32 (float64 for
        float64 input).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, by name.
    """
    op = "decode_attention"
    rows = "s m" if block_table is None else "pages page_size"
    sizes = check_shapes(
        op,
        {
            "q": (q, "s l h k"),
            "k_cache": (k_cache, f"{rows} h_kv k"),
            "v_cache": (v_cache, f"{rows} h_kv v"),
            "lengths": (lengths, "s"),
            "block_table": (block_table, "s blocks"),
            "alibi_slopes": (alibi_slopes, "h"),
            "sinks": (sinks, "h"),
        },
        ("q", "k_cache", "v_cache", "lengths"),
    )
    check_same_dtype(op, {"q": q, "k_cache": k_cache, "v_cache": v_cache})
    check_dtypes(op, {"lengths": lengths, "block_table": block_table}, [torch.int32])
    check_options(op, "bool", return_lse=return_lse)
    check_options(op, "int or None", num_splits=num_splits)
    scale = check_logits(op, sizes, q, scale, softcap, alibi_slopes, sinks)
    left, _ = bounds(op, True, window)
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"{op}: `num_splits` must be at least 1, or None; got {num_splits}")
    check_range(op, 1, num_splits=num_splits)
    if readable(lengths):  # copies, so that what is checked stays so whatever another thread writes meanwhile
        lengths, block_table = lengths.clone(), None if block_table is None else block_table.clone()
        check_places(lengths, block_table, k_cache)
    out, lse = _DECODE(
        implementation,
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        lengths=lengths,
        block_table=block_table,
        left=left,
        scale=scale,
        softcap=float(softcap),
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        num_splits=num_splits,
        return_lse=return_lse,
    )
    return (out, lse) if return_lse else out


def check_places(lengths: Tensor, block_table: Tensor | None, k_cache: Tensor) -> None:
    """Whether all tokens lie within the cache; reads them, which on a GPU would mean to wait for it.

    Raises:
        ValueError: a length beyond the cache, or a page that does not exist.
    """
    op = "decode_attention"
    pages, size = k_cache.shape[:2]
    room = size if block_table is None else block_table.shape[1] * size
    for i, length in enumerate(lengths.tolist()):
        if not 0 <= length <= room:
            raise ValueError(f"{op}: `lengths` must lie between 0 and the cache's {room}; got {length} at {i}")
    if block_table is None or block_table.numel() == 0:
        return
    low, high = (int(page) for page in block_table.aminmax())
    if low < 0 or high >= pages:  # which is an error only where the entry is used
        used = torch.arange(block_table.shape[1]) * size < lengths[:, None]
        wrong = (used & ((block_table < 0) | (block_table >= pages))).nonzero().tolist()
        if wrong:
            i, j = wrong[0]
            page = int(block_table[i, j])
            raise ValueError(f"{op}: `block_table` must name pages 0 to {pages - 1}; got {page} in row {i}")


def _fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    left: int,
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    num_splits: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    s, l, h, _ = q.shape
    return q.new_empty(s, l, h, v_cache.shape[-1]), q.new_empty((s, h, l) if return_lse else (0,), dtype=precision(q))


_DECODE = Op(
    "decode_attention",
    __name__,
    ("triton", "cpu", "sdpa", "reference"),
    fake=_fake,
    batched={"q": 4, "k_cache": 4, "v_cache": 4, "lengths": 1},
)
