"""Attention through PyTorch's ``scaled_dot_product_attention``.

That aligns queries and keys at their beginnings and gives NaN to a query that sees nothing; here neither
comes through."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.double_backward import say_way_out
from ssmkernels.core.packing import spans
from ssmkernels.core.plain import readable
from ssmkernels.core.validate import HALF, precision
from ssmkernels.ops.attention import hidden, tiled, triton
from ssmkernels.ops.attention.reference import apart, distances, in_window

LARGE = 2**21  # numbers of a mask that is better not written
VECTOR = 64  # at least the numbers in a vector register of any CPU
BLOCK = 64  # a window's blocks are multiples of it: aligned for vectors, and large enough to be worth a block


def unsupported(a: Any) -> str | None:
    if a.softcap > 0:
        return "PyTorch's attention has no softcap"
    if a.sinks is not None:
        return "PyTorch's attention has no sinks"
    if getattr(a, "block_offsets", None) is not None:  # attention alone has them; its rules serve decode_attention too
        return "PyTorch's attention has no block masks"
    if a.return_lse:
        return "PyTorch's attention does not return the log-sum-exp"
    return None


def slow(a: Any) -> str | None:
    if a.q.device.type != "cpu":
        return _slow_on_gpu(a)
    lengths = [(a.q.shape[1], a.k.shape[1])]
    if a.cu_seqlens is not None and not torch.compiler.is_compiling():
        borders = (a.cu_seqlens.tolist(), a.cu_seqlens_k.tolist())
        lengths = list(zip(*([end - start for start, end in itertools.pairwise(b)] for b in borders), strict=True))
    alibi, own = a.alibi_slopes is not None, getattr(a, "q_positions", None) is not None
    if own:
        size = a.q.shape[0] * sum(l * m for l, m in lengths)
    else:
        size = sum(mask_size(l, m, a.left, a.right, alibi) for l, m in lengths)
    size *= a.q.shape[2] if alibi else 1
    return f"PyTorch's attention would need a mask of {size} numbers" if size > LARGE else None


def _slow_on_gpu(a: Any) -> str | None:
    """Its other kernels are there for what ours cannot run."""
    if triton.missing() or triton.unsupported(a):
        return None
    if a.cu_seqlens is not None:
        return "PyTorch's attention would take one packed sequence after another"
    own = getattr(a, "q_positions", None) is not None
    if own or mask_size(a.q.shape[1], a.k.shape[1], a.left, a.right, a.alibi_slopes is not None):
        return "PyTorch's fastest kernel takes no masks"
    return None


def mask_size(l: int, m: int, left: int, right: int, alibi: bool) -> int:
    """Numbers in the mask that one sequence needs, for one head."""
    left = left if left < m - 1 else -1
    right = right if right < l - 1 else -1
    if left >= 0 and right >= 0 and m >= 4 * _block_size(left, right):
        return 2 * l * _block_size(left, right)
    if not alibi and left < 0 and (right < 0 or (right == 0 and l == m)):
        return 0
    return l * m


def traceable(a: Any) -> bool:
    """Whether no loop over sequences has to be kept from compilers."""
    return a.cu_seqlens is None


def compute(a: Any) -> tuple[Tensor, Tensor]:
    own = a.q_positions is not None

    def part(queries: slice, keys: slice) -> Tensor:
        q, k, v = a.q[:, queries], a.k[:, keys], a.v[:, keys]
        if not own:
            return one_batch(q, k, v, a.left, a.right, a.scale, a.alibi_slopes)
        distance = apart(a.q_positions[:, queries], a.k_positions[:, keys])[:, None]
        return _at_positions(q, k, v, distance, a.left, a.right, a.scale, a.alibi_slopes)

    if a.cu_seqlens is None:
        out = part(slice(None), slice(None))
    else:
        outs = [part(slice(0), slice(0))]
        for (_, queries), (_, keys) in zip(spans(a.cu_seqlens), spans(a.cu_seqlens_k), strict=True):
            outs.append(part(queries, keys))
        out = torch.cat(outs, dim=1)
    masked = a.left >= 0 or (a.right >= 0 and (own or a.q.shape[1] > 1))
    if masked and hidden.spread(out if own else _telling(out, a.left, a.cu_seqlens)):
        out = hidden.repaired(out, tiled.compute(a)[0])
    return out, a.q.new_empty(0, dtype=precision(a.q))


def _telling(out: Tensor, left: int, cu_seqlens: Tensor | None) -> Tensor:
    """The rows that show whether a hidden value has spread: the last query of a long causal call sees every value."""
    causal = left < 0 and cu_seqlens is None
    return out[:, -1] if causal and out.shape[1] >= VECTOR else out


def one_batch(
    q: Tensor, k: Tensor, v: Tensor, left: int, right: int, scale: float, alibi_slopes: Tensor | None
) -> Tensor:
    """One batch without packing: ``(b, l, h, v)``."""
    l, m = q.shape[1], k.shape[1]
    # Queries that see nothing end before the first key begins: they are the first ones, as both end together.
    blind = l if m == 0 else max(0, l - m - right) if right >= 0 else 0
    if blind > 0:
        seeing = one_batch(q[:, blind:], k, v, left, right, scale, alibi_slopes)
        return F.pad(seeing, (0, 0, 0, 0, blind, 0))
    left = left if left < m - 1 else -1
    right = right if right < l - 1 else -1
    if left >= 0 and right >= 0 and m >= 4 * _block_size(left, right):
        return _by_blocks(q, k, v, left, right, scale, alibi_slopes)
    if alibi_slopes is None and left < 0 and (right < 0 or (right == 0 and l == m)):
        return _sdpa(q, k, v, scale, is_causal=right == 0)
    distance = distances(l, m, q.device)
    return _sdpa(q, k, v, scale, _mask(q, distance, in_window(distance, left, right), alibi_slopes))


def _at_positions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distance: Tensor,
    left: int,
    right: int,
    scale: float,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """One batch without packing whose keys are at a ``distance`` (b 1 l m) from the queries: ``(b, l, h, v)``."""
    if not k.shape[1]:
        return one_batch(q, k, v, left, right, scale, alibi_slopes)
    seen = in_window(distance, left, right)
    blind = ~seen.any(-1, keepdim=True)  # (b 1 l 1); such a query sees all, lest it give NaN, and is set to 0
    out = _sdpa(q, k, v, scale, _mask(q, distance, seen | blind, alibi_slopes))
    return out.masked_fill(blind.transpose(1, 2), 0)


def _block_size(left: int, right: int) -> int:
    return BLOCK * max(1, -(-(left + right) // BLOCK))


def _by_blocks(
    q: Tensor, k: Tensor, v: Tensor, left: int, right: int, scale: float, alibi_slopes: Tensor | None
) -> Tensor:
    """A window narrower than the keys: each block of z queries meets 2z keys, linear in the length."""
    b, l, m = q.shape[0], q.shape[1], k.shape[1]
    z = _block_size(left, right)
    n = -(-l // z)
    before = left - (m - l)  # padding, or if negative keys cut off: query i sees from key i on
    q = F.pad(q, (0, 0, 0, 0, 0, n * z - l)).unflatten(1, (n, z)).flatten(0, 1)  # (b n) z h k
    k, v = (_pairs(F.pad(x, (0, 0, 0, 0, before, (n + 1) * z - left - l)), n) for x in (k, v))

    row, column = torch.arange(z, device=q.device)[:, None], torch.arange(2 * z, device=q.device)
    start = z * torch.arange(n, device=q.device)[:, None, None]
    distance = column - left - row  # z 2z, the same in each block
    real = (start + column >= before) & (start + column < left + l)
    padding = start + row >= l  # such a query sees all, lest it give NaN
    seen = in_window(distance, left, right) & real | padding  # n z 2z
    out = _sdpa(q, k, v, scale, _mask(q, distance, seen.repeat(b, 1, 1)[:, None], alibi_slopes))
    return out.unflatten(0, (b, n)).flatten(1, 2)[:, :l]


def _pairs(x: Tensor, n: int) -> Tensor:
    """``(b, (n + 1) z, h, k)`` → each block with the next, ``(b n, 2z, h, k)``."""
    blocks = x.unflatten(1, (n + 1, -1))
    return torch.cat([blocks[:, :-1], blocks[:, 1:]], dim=2).flatten(0, 1)


def _mask(q: Tensor, distance: Tensor, seen: Tensor, alibi_slopes: Tensor | None) -> Tensor:
    """What PyTorch takes for a mask: bools as ``seen`` has them, or the bias ``(b or 1, h, l, m)``."""
    if alibi_slopes is None:
        return seen
    bias = -alibi_slopes.to(precision(q))[:, None, None] * distance.abs()  # (h l m)
    bias = bias.masked_fill(~seen, -torch.inf)
    return bias if bias.ndim == 4 else bias[None]  # its CPU kernel takes none of three axes


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    dtype = q.dtype
    if scale <= 0:  # with which PyTorch's causal kernels give NaN
        q, scale = q * scale, 1.0
    if mask is not None and mask.dtype != torch.bool:
        # In half precision a far key's bias would be off by whole units, and cuDNN misreads one of another dtype.
        q, k, v = (x.to(mask.dtype) for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    shared = groups > 1 and _takes_groups(q, k, v, mask)
    if groups > 1 and not shared:
        k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=shared,
    )
    out = say_way_out(out, "attention: PyTorch's scaled_dot_product_attention").transpose(1, 2).to(dtype)
    return out if q.device.type != "cpu" else _with_nan(q, out, k.shape[1])


def _with_nan(q: Tensor, out: Tensor, keys: int) -> Tensor:
    """``out`` with NaN in the rows whose query has one: PyTorch's CPU kernel gives 0 if the keys fill no vector.

    Compiled code has no branch here, so that one graph serves few keys and many.
    """
    if not torch.compiler.is_compiling() and (keys >= VECTOR or (readable(q) and hidden.finite(q))):
        return out
    return out.masked_fill(q.isnan().any(-1, keepdim=True), torch.nan)


def _takes_groups(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether a fused kernel lets heads share keys; on a GPU PyTorch would otherwise write all logits to memory."""
    if q.device.type == "cpu":
        return True
    return mask is None and q.dtype in HALF and k.shape[3] == v.shape[3] <= 256
