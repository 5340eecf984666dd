"""Memory in pages that several caches share, and who holds which (PagedAttention, Kwon et al. 2023, arXiv 2309.06180).

Who holds what is kept on the host, in lists: to find room for a token nothing is asked of the device.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Pages:
    """A pool of pages, each for the keys and values of ``page_size`` tokens.

    Attributes:
        keys: ``(pages, page_size, h_kv, k)``. What no token was written to has no meaning.
        values: ``(pages, page_size, h_kv, v)``.
        fixed: a backward pass may still need what stands here, so that nothing more is written.
        owners: of each page, how many sequences hold it. Only one with a single owner may be written to.
        free: pages that nobody holds.
        lasting: caches come and go in it, so that none moves to a pool of its own because much is free.
    """

    lasting = False

    def __init__(self, keys: Tensor, values: Tensor, fixed: bool):
        self.keys, self.values, self.fixed = keys, values, fixed
        self.owners = [0] * keys.shape[0]
        self.free: list[int] = []

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.keys.shape[1]

    @property
    def in_use(self) -> int:
        """Pages that somebody holds."""
        return len(self.owners) - len(self.free)

    def take(self, count: int) -> list[int]:
        """Free pages, for one owner each; the pool grows where they are too few."""
        missing = count - len(self.free)
        if missing > 0:
            self.grow(missing if self.fixed else max(missing, self.ahead))
        taken = [self.free.pop() for _ in range(count)]
        for page in taken:
            self.owners[page] = 1
        return taken

    @property
    def ahead(self) -> int:
        """By how many pages it grows where fewer would do."""
        return len(self.owners)

    def grow(self, count: int) -> None:
        """So many free pages more."""
        keys, values = (F.pad(x, (0,) * (2 * x.ndim - 1) + (count,)) for x in (self.keys, self.values))
        self.keys, self.values = keys, values
        before = len(self.owners)
        self.owners += [0] * count
        self.free += range(before + count - 1, before - 1, -1)  # the first of them is taken first

    def hold(self, pages: Iterable[int]) -> None:
        """One owner more for each."""
        for page in pages:
            self.owners[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One owner less for each."""
        for page in pages:
            self.owners[page] -= 1
            if not self.owners[page]:
                self.free.append(page)
                self.emptied(page)

    def emptied(self, page: int) -> None:
        """Told of each page that nobody holds any more."""

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """What stands in some pages, into others."""
        source, target = on_device([sources, targets], self.keys.device)
        for x in (self.keys, self.values):
            x[target] = x[source]


class Holding:
    """The pages that each sequence of a cache holds, in the order of its tokens. They are given back when it goes.

    Attributes:
        pool: where they are.
        rows: their numbers.
    """

    def __init__(self, pool: Pages, rows: list[list[int]]):
        self.pool, self.rows = pool, rows
        pool.hold(itertools.chain.from_iterable(rows))

    def __del__(self) -> None:
        self.pool.release(itertools.chain.from_iterable(self.rows))

    @property
    def distinct(self) -> list[int]:
        """Each page once."""
        return list(dict.fromkeys(itertools.chain.from_iterable(self.rows)))

    @property
    def shared(self) -> bool:
        """Whether another cache holds any of them too."""
        mine = Counter(itertools.chain.from_iterable(self.rows))
        return any(self.pool.owners[page] > count for page, count in mine.items())

    @classmethod
    def concatenate(cls, holdings: Sequence[Holding]) -> Holding:
        """The pages of all their sequences, in the first one's pool; pages of other pools are copied there."""
        pool, rows = holdings[0].pool, []
        fresh: list[int] = []  # held by us until the rows hold them
        for holding in holdings:
            if holding.pool is pool:
                rows += [list(row) for row in holding.rows]
                continue
            old = holding.distinct
            new = dict(zip(old, pool.take(len(old)), strict=True))
            index, place = (on_device(numbers, pool.keys.device) for numbers in (old, list(new.values())))
            for x, y in ((pool.keys, holding.pool.keys), (pool.values, holding.pool.values)):
                x[place] = y[index].to(x.dtype)
            fresh += new.values()
            rows += [[new[page] for page in row] for row in holding.rows]
        joined = cls(pool, rows)
        pool.release(fresh)
        return joined

    def select(self, rows: Iterable[int]) -> Holding:
        """The pages of these sequences, held once more."""
        return Holding(self.pool, [list(self.rows[i]) for i in rows])

    def moved(self, convert: Callable[[Tensor], Tensor], fixed: bool) -> Holding:
        """The same in a pool of its own that has no other pages; what one page held, still does."""
        old = self.distinct
        index = on_device(old, self.pool.keys.device)
        keys, values = (convert(x.index_select(0, index)) for x in (self.pool.keys, self.pool.values))
        new = {page: number for number, page in enumerate(old)}
        return Holding(Pages(keys, values, fixed), [[new[page] for page in row] for row in self.rows])

    def table(self) -> Tensor:
        """int32 ``(s, blocks)``: the page of each block of each sequence, 0 past its last."""
        width = max(map(len, self.rows), default=0)
        filled = [row + [0] * (width - len(row)) for row in self.rows]
        return on_device(filled, self.pool.keys.device).view(len(filled), width)


def on_device(
    numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype = torch.int32
) -> Tensor:
    """A tensor of numbers, sent without waiting for the device."""
    sent = torch.tensor(numbers, dtype=dtype)
    if device.type == "cuda":
        sent = sent.pin_memory()
    return sent.to(device, non_blocking=True)
