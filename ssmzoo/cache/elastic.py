"""Pools of pages that take memory only for the pages in use (vTensor, Xu et al. 2024, arXiv 2407.15309).

A pool reserves addresses for all pages that it may ever have, and the system backs them with memory when they are first
written to. A page that nobody holds any more gives its memory back at once, for pools of other layers, or other states.
So growing copies nothing, and several pools share what memory there is without a plan of who gets how much.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from ssmzoo.cache.pages import Pages

_PRIVATE = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0) | getattr(mmap, "MAP_NORESERVE", 0)


class ElasticPages(Pages):
    """A pool of up to ``most`` pages, as :class:`~ssmzoo.cache.pages.Pages` otherwise.

    Where the device is no CPU, or the system takes no memory back, free pages keep theirs, and growing copies.

    Args:
        keys, values: of no pages, ``(0, page_size, h_kv, k)`` and ``(0, page_size, h_kv, v)``.
        most: pages that there is room for.
    """

    lasting = True

    def __init__(self, keys: Tensor, values: Tensor, most: int):
        super().__init__(keys, values, fixed=False)
        self.reserved = [_reserve(x, most) for x in (keys, values)] if _gives_back(keys.device) else None

    @property
    def ahead(self) -> int:
        """As the base's, but no further than there is room for."""
        room = None if self.reserved is None else len(self.reserved[0][0]) - len(self.owners)
        return super().ahead if room is None else min(super().ahead, room)

    def grow(self, count: int) -> None:
        if self.reserved is None or len(self.owners) + count > len(self.reserved[0][0]):
            self.reserved = None  # the tensors that stand keep the memory
            super().grow(count)
            return
        before = len(self.owners)
        self.owners += [0] * count
        self.free += range(before + count - 1, before - 1, -1)
        self.keys, self.values = (whole[: before + count] for whole, _ in self.reserved)

    def emptied(self, page: int) -> None:
        for whole, memory in self.reserved or ():
            size = whole[0].nbytes
            start = -(-page * size // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages of the system within ours
            end = (page + 1) * size // mmap.PAGESIZE * mmap.PAGESIZE
            if memory is not None and start < end:
                memory.madvise(mmap.MADV_DONTNEED, start, end - start)


def _gives_back(device: torch.device) -> bool:
    return device.type == "cpu" and hasattr(mmap, "MADV_DONTNEED") and bool(_PRIVATE)


def _reserve(x: Tensor, most: int) -> tuple[Tensor, mmap.mmap | None]:
    """Addresses for ``most`` pages like those of x, and what maps them."""
    shape = (most, *x.shape[1:])
    size = math.prod(shape) * x.dtype.itemsize
    if size == 0:
        return x.new_empty(shape), None
    try:
        memory = mmap.mmap(-1, size, flags=_PRIVATE)  # type: ignore[call-arg,unused-ignore]
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"Engine: `memory` must be so little that the system gives every layer addresses for it; {size:,} bytes, "
            f"for {most:,} pages of a layer, were refused: {error}"
        ) from None
    return torch.frombuffer(memory, dtype=x.dtype).view(shape), memory


_asked: ContextVar[tuple[int, int] | None] = ContextVar("elastic", default=None)


@contextlib.contextmanager
def elastic(page_size: int, memory: int) -> Iterator[None]:
    """New caches that can be in pages are, in pools of their own that have room for ``memory`` bytes each.

    Args:
        page_size: tokens of a page, where a mixer has no ``page_size`` of its own.
        memory: bytes.
    """
    token = _asked.set((page_size, memory))
    try:
        yield
    finally:
        _asked.reset(token)


def asked_page_size() -> int | None:
    """The size of pages within :func:`elastic`; None elsewhere."""
    asked = _asked.get()
    return None if asked is None else asked[0]


def new_pool(keys: Tensor, values: Tensor) -> Pages:
    """A pool without pages, for ones like keys and values ``(0, page_size, h_kv, …)``."""
    asked = _asked.get()
    if asked is None:
        return Pages(keys, values, fixed=False)
    page = sum(x.shape[1:].numel() * x.itemsize for x in (keys, values))
    return ElasticPages(keys, values, asked[1] // page + 1)
