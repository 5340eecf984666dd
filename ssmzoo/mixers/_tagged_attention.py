"""Attention among tokens of the same group, where a tag of each query and key tells its groups.

Tokens are sorted by group and packed, one group after another; causal masks go by the tokens' own positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import attention
from ssmkernels.core.autocast import without_autocast
from ssmkernels.core.plain import in_vmap
from ssmkernels.core.validate import precision
from ssmzoo.cache import FEW, KVCache, append
from ssmzoo.cache.tokens import owners
from ssmzoo.mixers._cached_heads import CachedHeads, Newest
from ssmzoo.state import State


@dataclasses.dataclass
class TaggedState(State):
    """Keys and values of all tokens, and the keys' tags.

    Attributes:
        cache: keys and values.
        tags: a cache whose keys are the tags ``(s, capacity, h, t)``, int32, and whose values are empty.
    """

    cache: KVCache
    tags: KVCache


class Tagged(NamedTuple):
    """Tokens of one side: ``rows`` (n h d), their tags (n h t), positions (n) and sequences (n)."""

    rows: Tensor
    tags: Tensor
    positions: Tensor
    sequences: Tensor


class Grouping(NamedTuple):
    """The group of each query and each key, (n h) from 0 on, -1 for none; the sign of its sums; ``most``, of groups."""

    queries: Tensor
    keys: Tensor
    sign: int
    most: int


class TaggedAttention(CachedHeads):
    """Attention among tokens of the same group; which groups there are says the mixer made of it.

    Its state is a :class:`TaggedState`. A few new tokens meet all keys of the cache under a mask, more are sorted.

    Attributes:
        n_tags: t, numbers in the tag of a token.
    """

    state_class = TaggedState
    n_tags: int

    def tagged(self, q: Tensor, k: Tensor, places: Tensor, extra: Any) -> tuple[Tensor, Tensor]:
        """Tags of queries and keys (b l h d) at places (b or 1, l), int32 (b l h t); ``extra`` as :meth:`project`'s."""
        raise NotImplementedError

    def groupings(self, q_tags: Tensor, k_tags: Tensor) -> Sequence[Grouping]:
        """Ways to group tokens, by tags (n h t) of the queries and of the keys, that between them show each pair once.

        Where pairs fall together in several ways, further groupings with a sign of -1 take them off.
        """
        raise NotImplementedError

    def shown(self, q_tags: Tensor, k_tags: Tensor) -> Tensor:
        """Whether some grouping shows a pair: tags (… t) that broadcast → bool (…)."""
        raise NotImplementedError

    def initial_state(self, batch_size: int, max_length: int | None = None) -> TaggedState:
        self.check_has_state()
        like = torch.empty(0, dtype=torch.int32, device=self.like().device)
        shape = (batch_size, self.n_heads, self.n_tags, 0)
        tags = KVCache.empty(like, shape, max_length or 0, None)
        return TaggedState(self.empty_cache(batch_size, max_length or 0), tags)

    def cache_of(self, state: TaggedState | None) -> KVCache | None:
        return None if state is None else state.cache

    def attend(self, new: Newest, state: Any) -> Tensor:
        _, places, q, k, v, first, cu_seqlens, extra = new
        q_tags, k_tags = self.tagged(q, k, places, extra)
        if state is not None:
            append(state.tags, k_tags, k_tags[..., :0], cu_seqlens, k_tags)
        if not first and cu_seqlens is None and q.shape[1] <= FEW:
            m = state.cache.longest
            k, v, k_tags = (t[:, :m] for t in (state.cache.keys, state.cache.values, state.tags.keys))
            return self._masked(q, q_tags, places, k, v, k_tags)
        if first and cu_seqlens is None and in_vmap():  # no sorting there: each call has groups of its own
            return self._masked(q, q_tags, places, k, v, k_tags)
        (b, l), device = q.shape[:2], q.device
        row = torch.arange(b, device=device)[:, None].expand(b, l)
        own = row if cu_seqlens is None else owners(cu_seqlens, l)[0][None]
        queries = Tagged(*(t.flatten(0, 1) for t in (q, q_tags, places.expand(b, l), own)))
        if first:
            keys, values = queries._replace(rows=k.flatten(0, 1), tags=k_tags.flatten(0, 1)), v.flatten(0, 1)
        elif cu_seqlens is None:
            k, v, _ = state.cache.recent(l, -1)
            m = k.shape[1]
            place = torch.arange(m, device=device).expand(b, m)
            tags, of_row = state.tags.recent(l, -1)[0], row[:, :1].expand(b, m)
            keys, values = Tagged(*(t.flatten(0, 1) for t in (k, tags, place, of_row))), v.flatten(0, 1)
        else:
            which = cu_seqlens.diff() > 0
            k, v, cu_seqlens_k = state.cache.packed(which)
            of_row, place = owners(cu_seqlens_k, k.shape[1])
            keys, values = Tagged(k[0], state.tags.packed(which)[0][0], place, of_row), v[0]
        sequences = b if cu_seqlens is None else len(cu_seqlens) - 1
        return self._sorted(queries, keys, values, sequences).unflatten(0, (b, l))

    def _sorted(self, queries: Tagged, keys: Tagged, values: Tensor, sequences: int) -> Tensor:
        """Every grouping's attention, joined: (n h d)."""
        groupings = self.groupings(queries.tags, keys.tags)
        alone = len(groupings) == 1
        outs, lses = [], []
        for grouping in groupings:
            out, lse = self._grouped(queries, keys, values, grouping, sequences, not alone)
            outs.append(out)
            lses.append(lse)
        out = outs[0] if alone else joined(outs, lses, [grouping.sign for grouping in groupings])
        return out.to(queries.rows.dtype)

    def _grouped(
        self, queries: Tagged, keys: Tagged, values: Tensor, grouping: Grouping, sequences: int, with_lse: bool
    ) -> tuple[Tensor, Tensor]:
        """out (n h d) and, if wanted, lse (n h) of attention within the groups of each sequence and head."""
        h = self.n_heads
        head = torch.arange(h, device=values.device)

        def sides(side: Tagged, groups: Tensor, without: int) -> tuple[Tensor, Tensor]:
            """Rows (n h) sorted by the group of their sequence and head, and these groups; ``without`` for none."""
            apart = (side.sequences[:, None] * h + head) * grouping.most + groups
            group, order = apart.masked_fill(groups < 0, without).flatten().sort(stable=True)
            return order, group

        # Queries without a group are one of their own, which has no keys, and keys without a group another
        count = sequences * h * grouping.most
        q_order, q_group = sides(queries, grouping.queries, count)
        k_order, k_group = sides(keys, grouping.keys, count + 1)
        groups = torch.arange(count + 2, device=values.device)

        def packed(x: Tensor, order: Tensor) -> Tensor:
            return x.flatten(0, 1).index_select(0, order)[None, :, None]

        def borders(group: Tensor) -> Tensor:
            return F.pad(torch.searchsorted(group, groups, right=True, out_int32=True), (1, 0))

        q_positions = queries.positions[q_order // h][None] if self.causal else None
        k_positions = keys.positions[k_order // h][None] if self.causal else None
        found = attention(
            packed(queries.rows, q_order),
            packed(keys.rows, k_order),
            packed(values, k_order),
            causal=self.causal,
            cu_seqlens=borders(q_group),
            cu_seqlens_k=borders(k_group),
            q_positions=q_positions,
            k_positions=k_positions,
            return_lse=with_lse,
        )
        out, lse = found if isinstance(found, tuple) else (found, None)
        shape = (len(queries.rows) * h, values.shape[2])
        out = out.new_zeros(shape).index_copy(0, q_order, out[0, :, 0]).unflatten(0, (-1, h))
        if lse is None:
            return out, out.new_empty(0)
        return out, lse.new_full(shape[:1], -torch.inf).index_copy(0, q_order, lse[0, 0]).unflatten(0, (-1, h))

    def _masked(self, q: Tensor, q_tags: Tensor, places: Tensor, k: Tensor, v: Tensor, k_tags: Tensor) -> Tensor:
        """Queries (s l h d) at places (s or 1, l) over keys and values from place 0 on, under a mask: (s l h d)."""
        wide = precision(q)
        place = torch.arange(k.shape[1], device=q.device)
        seen = self.shown(q_tags[:, :, :, None], k_tags.transpose(1, 2)[:, None])  # (s l h m)
        if self.causal:
            seen = seen & (place <= places[:, :, None])[:, :, None]
        blind = ~seen.any(-1, keepdim=True)
        with without_autocast(q.device.type):  # it would round logits to half precision
            logits = torch.einsum("slhd,smhd->slhm", q.to(wide), k.to(wide)) / math.sqrt(q.shape[3])
            weights = logits.masked_fill(~(seen | blind), -torch.inf).softmax(-1)
            weights = weights.masked_fill(blind, 0)
            return torch.einsum("slhm,smhd->slhd", weights, v.to(wide)).to(q.dtype)


def joined(outs: Sequence[Tensor], lses: Sequence[Tensor], signs: Sequence[int]) -> Tensor:
    """Σ_t sign_t exp(lse_t) out_t / Σ_t sign_t exp(lse_t), with outs (n h d) and lses (n h); 0 where all are -∞.

    No term is larger than the whole, in which each pair counts once: a rounding grows at most by the number of terms.
    """
    parts = torch.stack(tuple(lses))
    top = parts.detach().amax(0)
    top = top.masked_fill(top == -torch.inf, 0)
    sign = torch.tensor(signs, dtype=parts.dtype, device=parts.device)[:, None, None]
    weights = sign * torch.exp(parts - top)
    total = weights.sum(0)
    weights = weights / total.masked_fill(total <= 0, 1)
    return sum(w[..., None] * out.to(w.dtype) for w, out in zip(weights, outs, strict=True))
