"""What the makers of block masks share: the ends of blocks, and masks from blocks that are visible whole or in part."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ssmkernels.core.block_mask import BlockMask, from_blocks
from ssmkernels.core.validate import check_range

BlockSize = int | tuple[int, int]


def checked(maker: str, q_len: int, k_len: int | None, block_size: BlockSize, heads: int = 1) -> tuple[int, int]:
    """``block_size`` as a pair.

    Raises:
        ValueError: a length below 0, no heads, or blocks of no size or of keys that do not fill bytes.
    """
    for name, value, least in (("q_len", q_len, 0), ("k_len", k_len, 0), ("heads", heads, 1)):
        check_range(maker, least, **{name: value})
    pair = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(pair) != 2 or min(pair) < 1 or pair[1] % 8:
        raise ValueError(f"{maker}: `block_size` must be queries and keys, these a multiple of 8; got {block_size!r}")
    check_range(maker, 1, block_size=max(pair))
    return pair


def made(
    f: Callable[[Tensor, Tensor, Tensor], Tensor],
    q_len: int,
    k_len: int,
    block_size: tuple[int, int],
    full: Tensor,
    partly: Tensor,
    alike: Tensor | None = None,
) -> BlockMask:
    """A mask whose blocks are ``full``, or as ``f`` says where ``partly``: each bool (heads rows columns)."""
    block_q, block_k = block_size

    def contents(h: Tensor, r: Tensor, c: Tensor) -> Tensor:
        i = r[:, None, None] * block_q + torch.arange(block_q, device=r.device)[:, None]
        j = c[:, None, None] * block_k + torch.arange(block_k, device=r.device)
        seen = f(h[:, None, None], i.clamp(max=q_len - 1), j.clamp(max=k_len - 1))
        if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
            came = seen.dtype if isinstance(seen, Tensor) else type(seen).__name__
            raise TypeError(f"from_function: `f` must return bool; got {came}")
        return seen.expand(len(h), block_q, block_k)

    return from_blocks(q_len, k_len, block_size, full, partly, contents, alike)


def ends(q_len: int, k_len: int, block_size: tuple[int, int]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """First and last index of each block of queries, and of keys."""
    firsts = [torch.arange(0, length, block) for length, block in zip((q_len, k_len), block_size, strict=True)]
    (q, last_q), (k, last_k) = (
        (first, (first + block - 1).clamp(max=length - 1))
        for first, length, block in zip(firsts, (q_len, k_len), block_size, strict=True)
    )
    return (q, last_q), (k, last_k)


def any_and_all(flags: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Of each block of flags."""
    least, most = least_and_most(flags.int(), block)
    return most > 0, least > 0


def least_and_most(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Of each block of integers ``(l)``; the last one may be short."""
    if not len(values):
        return values, values
    short = -len(values) % block
    least, most = torch.cat([values, values[-1:].expand(short)]).unflatten(0, (-1, block)).aminmax(dim=1)
    return least, most
