"""The functions of attention.

What all of them take, beside queries, keys and values, packed into one tensor or not:

- ``dropout_p``: the probability with which a weight is set to 0; the others are divided by what is left. A number for
  each weight is drawn from PyTorch's generator of the device, in the order of ``(b, h, l, m)``, in packed batches for
  one sequence after another; ``torch.manual_seed`` repeats them. Then all weights are in memory at once.
- ``softmax_scale``: of the products of queries and keys; 1/√d if None.
- ``causal``: no query sees a key after its own position. Queries and keys are aligned at their ends.
- ``window_size``: ``(left, right)``, how many keys to either side of its own position a query sees; -1 for all.
- ``softcap``: bounds the scaled products smoothly to ± softcap; 0 for none.
- ``alibi_slopes``: ``(h)`` or ``(b, h)``, float32: linear penalties on distance.
- ``deterministic``: has no effect, as results always are.
- ``return_attn_probs``: whether to return the log-sum-exp, and the weights, as well. The weights are None without
  dropout. With it they are exponentials ``(b, h, l, m)`` of logits less the largest one of their query, negative where
  a weight was dropped; in packed batches l and m are those of the longest sequences, and 0 stands beyond shorter ones.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.compat._calls import compatible, taking
from ssmkernels.compat._flash import dense, varlen
from ssmkernels.compat._flash_cache import with_cache

Attended = Tensor | tuple[Tensor, Tensor, Tensor | None]

OPTIONS = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"


@compatible(dense)
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attended:
    """:func:`ssmkernels.attention` with the package's names; further arguments as above.

    Args:
        q: ``(b, l, h, d)``.
        k, v: ``(b, m, h_kv, d)``.

    Returns:
        ``(b, l, h, d)``; the log-sum-exp is ``(b, h, l)``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, by name.
    """


@taking(dense, f"qkv {OPTIONS}", flash_attn_func)
def flash_attn_qkvpacked_func(*args: Any, qkv: Tensor, **options: Any) -> Attended:
    """:func:`flash_attn_func` of ``qkv (b, l, 3, h, d)``."""


@taking(dense, f"q kv {OPTIONS}", flash_attn_func)
def flash_attn_kvpacked_func(*args: Any, kv: Tensor, **options: Any) -> Attended:
    """:func:`flash_attn_func` of ``q (b, l, h, d)`` and ``kv (b, m, 2, h_kv, d)``."""


@taking(varlen, f"q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {OPTIONS} block_table", flash_attn_func)
def flash_attn_varlen_func(
    *args: Any,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_table: Tensor | None = None,
    **options: Any,
) -> Attended:
    """Attention within sequences that are packed one after another; further arguments as above.

    Args:
        q: ``(total of l, h, d)``.
        k, v: ``(total of m, h_kv, d)``; or, with ``block_table``, pages ``(pages, page size, h_kv, d)``.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 ``(b + 1)``, borders of the sequences.
        max_seqlen_q, max_seqlen_k: have no effect.
        block_table: integers ``(b, blocks)``: token t of sequence i is in page ``block_table[i, t // page size]``.

    Returns:
        ``(total of l, h, d)``; the log-sum-exp is ``(h, total of l)``.

    Raises:
        TypeError, ValueError: as :func:`flash_attn_func`.
    """


@taking(varlen, f"qkv cu_seqlens max_seqlen {OPTIONS}", flash_attn_func)
def flash_attn_varlen_qkvpacked_func(
    *args: Any, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, **options: Any
) -> Attended:
    """:func:`flash_attn_varlen_func` of ``qkv (total, 3, h, d)``, with borders ``cu_seqlens (b + 1)``."""


@taking(varlen, f"q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {OPTIONS}", flash_attn_func)
def flash_attn_varlen_kvpacked_func(
    *args: Any,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> Attended:
    """:func:`flash_attn_varlen_func` of ``q (total of l, h, d)`` and ``kv (total of m, 2, h_kv, d)``."""


@compatible(with_cache)
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a cache, to which new keys and values are added first; no gradients. Further arguments as above.

    Args:
        q: ``(b, l, h, d)``, the queries of the newest tokens.
        k_cache, v_cache: ``(rows, m, h_kv, d)``; or, with ``block_table``, pages ``(pages, page size, h_kv, d)``.
        k, v: ``(b, n, h_kv, d)``, new tokens, which are written into the caches after the ``cache_seqlens`` that are
            there.
        rotary_cos, rotary_sin: ``(positions, r/2)``: r channels of q and k are turned by these, at ``cache_seqlens``
            and the positions after it; without ``causal`` or a window all queries at ``cache_seqlens``. Needs k and v.
        cache_seqlens: tokens of each sequence in the cache before the new ones, a number or integers ``(b)``; if None,
            the cache is full.
        cache_batch_idx: integers ``(b)``, the rows of the caches that belong to the sequences; the first b if None.
        cache_leftpad: integers ``(b)``, at which position of its row each sequence begins.
        block_table: integers ``(b, blocks)``, as :func:`flash_attn_varlen_func`.
        rotary_interleaved: channels 0 and 1, 2 and 3, … are turned together; otherwise 0 and r/2, 1 and r/2 + 1, ….
        num_splits: a hint, which has no effect beyond rounding.
        return_softmax_lse: whether to return the log-sum-exp ``(b, h, l)`` as well.

    Returns:
        ``(b, l, h, d)``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, by name; tokens that the cache has
            no room for.
    """
