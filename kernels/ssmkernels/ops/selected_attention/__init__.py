"""Attention of each query to the blocks of keys that it selected (arXiv 2502.11089, arXiv 2502.13189)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.core.declare import op
from ssmkernels.core.plain import readable
from ssmkernels.core.validate import check_range
from ssmkernels.ops.attention._arguments import check_logits, scale_of

__all__ = ["selected_attention"]


def _check(name: str, sizes: dict[str, int], block_size: int, **others: Any) -> None:
    """Heads, and the size of a block."""
    check_logits(name, sizes, 0.0)
    h, h_kv, g = sizes["h"], sizes["h_kv"], sizes["g"]
    if g == 0 or h % g or g % h_kv:
        raise ValueError(
            f"{name}: `blocks` must have heads that divide the {h} of `q` and are a multiple of the {h_kv} of `k`; "
            f"got {g}"
        )
    if block_size < 1:
        raise ValueError(f"{name}: `block_size` must be at least 1; got {block_size}")
    check_range(name, 1, block_size=block_size)


def _lower(blocks: Tensor, block_size: int, scale: float | None, **others: Any) -> dict[str, Any]:
    """What implementations take: a scale, and blocks that exist."""
    if readable(blocks):
        blocks = checked_blocks(blocks, others["k"].shape[1], block_size)
    return {**others, "blocks": blocks, "block_size": block_size, "scale": scale_of(others["q"], scale)}


def checked_blocks(blocks: Tensor, m: int, block_size: int) -> Tensor:
    """A copy of them, all of which exist: what is checked stays so whatever another thread writes.

    On a GPU it reads nothing, which would mean to wait for it; numbers out of range are no block there.

    Raises:
        ValueError: a number of no block.
    """
    blocks, count = blocks.clone(), -(-m // block_size)
    if blocks.device.type == "cpu" and blocks.numel():
        low, high = (int(block) for block in blocks.aminmax())
        if low < -1 or high >= count:
            raise ValueError(
                f"selected_attention: `blocks` must lie between -1 and {count - 1}, for {m} keys in blocks of "
                f"{block_size}; got {low if low < -1 else high}"
            )
    return blocks


@op(
    shapes="""
        q: b l h k
        k: b m h_kv k
        v: b m h_kv v
        blocks: b l g n
    """,
    returns="out: b l h v; lse: b h l: sums if return_lse",
    int32="blocks",
    check=_check,
    takes="""
        q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, scale: float, return_lse: bool
    """,
    lower=_lower,
    implementations=("triton", "cpu", "tiled", "reference"),
)
def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of each query to the keys of the blocks that are named for it.

    Queries and keys are aligned at their ends: query i stands at key position p = i + m - l. With s the block size and
    the blocks B_i that query i selected, -1 for none::

        S_i   = {j : j ≤ p and ⌊j / s⌋ ∈ B_i}
        lse_i = log Σ_{j ∈ S_i} exp(scale · q_i · k_j),   out_i = Σ_{j ∈ S_i} exp(scale · q_i · k_j - lse_i) v_j

    The time grows with the number of blocks that are selected, and no larger memory is taken than for the results.

    Sizes: b batch, l queries, m keys, h heads, h_kv heads of keys and values, g heads that select (h a multiple of g, g
    one of h_kv; query heads 0 … h/g - 1 share the first selection), n blocks for each query, k and v the head dims.

    Args:
        q: queries, ``(b, l, h, k)``.
        k: keys, ``(b, m, h_kv, k)``.
        v: values, ``(b, m, h_kv, v)``.
        blocks: int32 ``(b, l, g, n)``, numbers of blocks of keys, in any order; -1 for none. A block that is named
            twice counts once, and one that begins after the query has nothing to see. It has no gradient.
        block_size: s, keys of a block; the last one may be shorter.
        scale: of the products; 1/√k if None.
        return_lse: whether to return the log-sum-exp as well.
        implementation: force one by name; the fastest that can run this call if None.

    Returns:
        ``(b, l, h, v)`` in q's dtype; with ``return_lse`` also lse ``(b, h, l)``, the natural logarithm, float32
        (float64 for float64 input). A query that sees no key gives 0 with gradients of 0, and an lse of -∞.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, by name.
    """
