"""How many bytes states take: those that are held, and those that further tokens will need."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ssmzoo.cache import PagedCache
from ssmzoo.cache.elastic import elastic
from ssmzoo.generate.arguments import TokenModel
from ssmzoo.state import State

STEP = 256  # tokens to which room for caches that have no pages is rounded


class Memory:
    """The states of a model within a budget.

    Pages count when they are in use; what else a state holds counts for each sequence. A cache that cannot be in pages
    takes as much for each sequence as for the longest, and twice that while it grows.

    Args:
        model: the model.
        limit: the budget in bytes.
        page_size: tokens of a page, where the model's config says nothing else.
        chunk: most tokens that a prompt is read by at once.

    Raises:
        ValueError: no request could ever run within the limit.

    Attributes:
        template: the state of one sequence before its first token, whose pools all others share.
    """

    def __init__(self, model: TokenModel, limit: int, page_size: int, chunk: int):
        self.model, self.limit, self.page_size, self.chunk = model, limit, page_size, chunk
        with elastic(page_size, limit), torch.inference_mode(False), torch.no_grad():
            self.template = model.initial_state(1)
        self.caches = [part for part in self.template.nested() if isinstance(part, PagedCache)]
        self.row = self._flat(self.template)
        self._known: dict[int, int] = {}
        self.grows = self._growth(STEP) > 0
        if (least := self.full(2)) > limit:
            raise ValueError(
                f"Engine: `memory` must be at least {least:,} bytes, for a prompt of one token and one new token; "
                f"got {limit:,}"
            )

    @property
    def pages(self) -> int:
        """Bytes of the pages in use."""
        return sum(cache.pages.pool.in_use * _page(cache) for cache in self.caches)

    @property
    def one_page(self) -> int:
        """Bytes of one page of each cache."""
        return sum(map(_page, self.caches))

    def rows(self, lengths: Iterable[int]) -> int:
        """Bytes of what is not in pages, of sequences of so many tokens in one batch."""
        lengths = list(lengths)
        grown = self._growth(max(lengths, default=0)) if self.grows else 0
        return len(lengths) * (self.row + 2 * grown)

    def new_pages(self, length: int, new: int) -> int:
        """Bytes of pages that ``new`` tokens after ``length`` take. Only whole pages are ever shared."""
        sizes = [(cache.pages.pool.page_size, _page(cache)) for cache in self.caches]
        return sum((-(-(length + new) // size) - -(-length // size)) * page for size, page in sizes)

    def all_pages(self, length: int, new: int) -> int:
        """Bytes of all pages of a sequence that has ``length`` tokens and takes ``new`` more."""
        total = 0
        for cache in self.caches:
            size = cache.pages.pool.page_size
            dropped = 0 if cache.keep is None else max(0, length - cache.keep) // size
            total += (-(-(length + new) // size) - dropped) * _page(cache)
        return total

    def full(self, length: int) -> int:
        """Most bytes of one sequence alone, over all of its tokens; or fewer, but more than the limit."""
        tokens = STEP  # what does not grow in pages is only found out by making it
        while self.grows and tokens < length and self.rows([tokens]) <= self.limit:
            tokens *= 2
        if self.grows and tokens < length:
            return self.rows([tokens])
        read = max(0, length - self.chunk)
        return self.rows([length]) + self.all_pages(read, length - read)

    def _growth(self, length: int) -> int:
        """Bytes by which what is not in pages grows with so many tokens."""
        steps = -(-length // STEP)
        if steps not in self._known:
            with elastic(self.page_size, self.limit):
                self._known[steps] = self._flat(self.model.initial_state(1, steps * STEP)) - self.row
        return self._known[steps]

    def _flat(self, state: State) -> int:
        """Bytes of a state beside its pages."""
        paged = [part for part in state.nested() if isinstance(part, PagedCache)]
        pools = sum(part.nbytes for part in paged)
        return state.nbytes - pools


def _page(cache: PagedCache) -> int:
    """Bytes of a page of keys and one of values."""
    pool = cache.pages.pool
    return sum(x.shape[1:].numel() * x.itemsize for x in (pool.keys, pool.values))
