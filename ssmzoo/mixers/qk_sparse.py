"""QK-sparse attention: some queries and keys of each head are dropped (Pagliardini et al. 2023, arXiv 2306.01160)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor

from ssmzoo.linear import Linear
from ssmzoo.mixers._cached_heads import CachedHeadOptions, Newest
from ssmzoo.mixers._draws import UNIT, SeededDraws
from ssmzoo.mixers._tagged_attention import Grouping, TaggedAttention
from ssmzoo.registry import register_mixer

STEP = (math.sqrt(5) - 1) / 2  # whose multiples are spread most evenly over the unit interval


@dataclasses.dataclass(kw_only=True)
class QKSparseOptions(CachedHeadOptions):
    """Beside those of :class:`~ssmzoo.mixers._cached_heads.CachedHeadOptions`.

    Attributes:
        drop: "learned" drops by the sign of a score, a linear map of the token; "random" drops fixed shares.
        keep_queries: share of each head's queries that "random" keeps, above 0 to 1.
        keep_keys: share of its keys.
        seed: of "random".
        bidirectional: every token sees later ones too; there is then no state.
    """

    drop: Literal["learned", "random"] = "learned"
    keep_queries: float = 0.5
    keep_keys: float = 0.5
    seed: int = 0
    bidirectional: bool = False


@register_mixer("qk_sparse")
class QKSparse(SeededDraws, TaggedAttention):
    """Softmax attention of those queries that each head keeps, to those keys that it keeps.

    With a_i and c_j whether head's query i and key j are kept::

        out_i = a_i σ(s_i) Σ_{j ≤ i, c_j} softmax_j(q_i · k_j / √d) σ(t_j) v_j        (of all j where bidirectional)

    With "learned" the scores s and t are linear maps of the token, and what scores above 0 is kept; the gates σ(s) and
    σ(t) are how the scores learn, as those of a router do. With "random" there are no gates, and the token at position
    p is kept where the fractional part of u + 0.618… p is below the share to keep, with u drawn for each head and side:
    so every stretch of tokens keeps that share. The attention is exact within what is kept, and takes the product of
    both shares of the time. A query that is dropped, or sees no key, gives 0.

    Args:
        d_model: width of input and output.
        options: those of :class:`QKSparseOptions`.

    With "random" ``offsets``, the u, is a buffer: saved with the weights, not trained, drawn from ``seed`` and the
    layer's number. The state is a :class:`~ssmzoo.mixers._tagged_attention.TaggedState` of all tokens, with a mark at
    those whose keys are kept; it holds the others' keys too, as the heads keep different ones.

    Raises:
        ValueError: sizes that do not fit together.
    """

    options_class = QKSparseOptions
    n_tags = 1
    offsets: Tensor  # (2, h), of queries and of keys, in parts of UNIT

    def __init__(self, d_model: int, **options: Any):
        o = QKSparseOptions(**options)
        super().__init__(d_model, o)
        for name, share in (("keep_queries", o.keep_queries), ("keep_keys", o.keep_keys)):
            if not 0 < share <= 1:
                raise ValueError(f"QKSparse: `{name}` must be above 0 and at most 1; got {share}")
        self.keep = (o.keep_queries, o.keep_keys)
        self.score_proj = Linear(d_model, 2 * self.n_heads, bias=True) if o.drop == "learned" else None
        self.set_draws(o.seed, uniform={} if o.drop == "learned" else {"offsets": (2, self.n_heads)})

    def mixing_flops(self, context: int) -> float:
        """4 · n_heads · head_dim for each pair that is kept; of learned scores, as if half of each side were."""
        seen = (max(context, 1) + 1) / 2 if self.causal else max(context, 1)
        share = 0.25 if self.score_proj is not None else self.keep[0] * self.keep[1]
        return 4 * self.n_heads * self.head_dim * seen * share

    def project(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        q, k, v, _ = super().project(x, places)
        if self.score_proj is None:
            return q, k, v, None
        scores = self.score_proj(x).unflatten(-1, (2, self.n_heads))  # (b l 2 h)
        return q, k, v * scores[:, :, 1].sigmoid()[..., None].to(v.dtype), scores

    def attend(self, new: Newest, state: Any) -> Tensor:
        out = super().attend(new, state)
        return out if new.extra is None else out * new.extra[:, :, 0].sigmoid()[..., None].to(out.dtype)

    def tagged(self, q: Tensor, k: Tensor, places: Tensor, extra: Any) -> tuple[Tensor, Tensor]:
        if extra is not None:
            kept = extra > 0
        else:
            at = (self.offsets.double() / UNIT + STEP * places[..., None, None]).frac()  # (b or 1, l, 2, h)
            kept = at < torch.tensor(self.keep, dtype=at.dtype, device=at.device)[:, None]
            kept = kept.expand(q.shape[0], -1, -1, -1)
        queries, keys = kept.int().unbind(2)
        return queries[..., None], keys[..., None]

    def groupings(self, q_tags: Tensor, k_tags: Tensor) -> list[Grouping]:
        queries, keys = (tags[..., 0].long() - 1 for tags in (q_tags, k_tags))
        return [Grouping(queries, keys, 1, 1)]

    def shown(self, q_tags: Tensor, k_tags: Tensor) -> Tensor:
        return ((q_tags > 0) & (k_tags > 0))[..., 0]
