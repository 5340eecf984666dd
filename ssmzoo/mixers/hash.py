"""Hash-sparse attention: exact within buckets of a hash (Pagliardini et al. 2023, arXiv 2306.01160)."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmzoo.mixers._cached_heads import CachedHeadOptions
from ssmzoo.mixers._draws import SeededDraws
from ssmzoo.mixers._lsh import rotation_buckets
from ssmzoo.mixers._tagged_attention import Grouping, TaggedAttention
from ssmzoo.registry import register_mixer

MOST_ROUNDS = 4  # r rounds take 2ʳ - 1 groupings


@dataclasses.dataclass(kw_only=True)
class HashOptions(CachedHeadOptions):
    """Beside those of :class:`~ssmzoo.mixers._cached_heads.CachedHeadOptions`.

    Attributes:
        n_buckets: of each round, even.
        n_rounds: hashes of each token; a query sees the keys that share a bucket with it in any of them.
        shared_qk: keys are the queries, divided by their root mean square, as in Reformer (arXiv 2001.04451).
        seed: of the hashes' random rotations.
        bidirectional: every token sees later ones too; there is then no state.
    """

    n_buckets: int = 16
    n_rounds: int = 1
    shared_qk: bool = False
    seed: int = 0
    bidirectional: bool = False


@register_mixer("hash")
class Hash(SeededDraws, TaggedAttention):
    """Softmax attention among tokens whose queries and keys fall into the same bucket of a random hash.

    It approximates softmax attention by leaving out pairs that point in different directions. With random rotations
    R_1 … R_r of each head and the hash h_r(x) = argmax(R_r x, -R_r x)::

        out_i = Σ_{j ∈ S(i)} softmax_j(q_i · k_j / √d) v_j
        S(i) = {j ≤ i : h_r(q_i) = h_r(k_j) in some round r}        or of all j, where bidirectional

    This is exact within S(i): tokens are sorted by bucket, and attention goes by their own positions. Rounds are
    joined by inclusion and exclusion: attention within the buckets of each round, less that within the joint buckets
    of two rounds, and so on, each weighted by its sum of exponentials. So a pair that shares several buckets counts
    once. A query whose buckets hold no key gives 0; with ``shared_qk`` its own key is always there. Unlike in Reformer,
    a token sees itself.

    Args:
        d_model: width of input and output.
        options: those of :class:`HashOptions`.

    ``rotations`` is a buffer: saved with the weights, not trained, drawn from ``seed`` and the layer's number. Its
    state is a :class:`~ssmzoo.mixers._tagged_attention.TaggedState` of all tokens and their keys' buckets. A few new
    tokens are compared with all of them.

    Raises:
        ValueError: sizes that do not fit together.
    """

    options_class = HashOptions
    rotations: Tensor  # (n_rounds, h, d, n_buckets / 2)

    def __init__(self, d_model: int, **options: Any):
        o = HashOptions(**options)
        super().__init__(d_model, o)
        self.check_at_least(2, n_buckets=o.n_buckets)
        self.check_at_least(1, n_rounds=o.n_rounds)
        if o.n_buckets % 2:
            raise ValueError(f"Hash: `n_buckets` must be even; got {o.n_buckets}")
        if o.n_rounds > MOST_ROUNDS:
            raise ValueError(f"Hash: `n_rounds` must be at most {MOST_ROUNDS}; got {o.n_rounds}")
        if o.n_buckets > 2**12:
            raise ValueError(f"Hash: `n_buckets` must be at most {2**12}; got {o.n_buckets}")
        self.n_buckets, self.n_rounds, self.shared_qk = o.n_buckets, o.n_rounds, o.shared_qk
        self.n_tags = o.n_rounds
        if o.shared_qk:
            del self.k_proj
        self.set_draws(o.seed, normal={"rotations": (o.n_rounds, self.n_heads, self.head_dim, o.n_buckets // 2)})

    def mixing_flops(self, context: int) -> float:
        """4 · n_heads · head_dim for each pair that a grouping shows, in even buckets, and the hashes' products."""
        seen = (max(context, 1) + 1) / 2 if self.causal else max(context, 1)
        shares = sum(self.n_buckets ** -len(rounds) for rounds in self._subsets())
        hashes = 2 * (1 if self.shared_qk else 2) * self.n_rounds * (self.n_buckets // 2) * self.head_dim
        return self.n_heads * (4 * self.head_dim * max(1.0, seen * shares) + hashes)

    def project(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        if not self.shared_qk:
            return super().project(x, places)
        q = self.turned(x, self.q_proj, places)
        return q, F.rms_norm(q, (self.head_dim,), eps=1e-6), self.heads_of(x, self.v_proj), None

    def tagged(self, q: Tensor, k: Tensor, places: Tensor, extra: Any) -> tuple[Tensor, Tensor]:
        q_buckets = rotation_buckets(q, self.rotations)
        return q_buckets, q_buckets if self.shared_qk else rotation_buckets(k, self.rotations)

    def groupings(self, q_tags: Tensor, k_tags: Tensor) -> list[Grouping]:
        found = []
        for rounds in self._subsets():
            q_group, k_group = (self._joint(tags, rounds) for tags in (q_tags, k_tags))
            found.append(Grouping(q_group, k_group, 1 if len(rounds) % 2 else -1, self.n_buckets ** len(rounds)))
        return found

    def shown(self, q_tags: Tensor, k_tags: Tensor) -> Tensor:
        return (q_tags == k_tags).any(-1)

    def _joint(self, tags: Tensor, rounds: tuple[int, ...]) -> Tensor:
        """The joint bucket of several rounds: tags (n h t) → (n h)."""
        group = torch.zeros_like(tags[..., 0], dtype=torch.int64)
        for r in rounds:
            group = group * self.n_buckets + tags[..., r]
        return group

    def _subsets(self) -> list[tuple[int, ...]]:
        rounds = range(self.n_rounds)
        return [chosen for size in rounds for chosen in itertools.combinations(rounds, size + 1)]
