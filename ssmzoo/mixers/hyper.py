"""HyperAttention: attention in near-linear time, by sorted hashes and sampling (Han et al. 2023, arXiv 2310.05869)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor

from ssmzoo.cache import KVCache, Logits, newest
from ssmzoo.mixers._cached_heads import CachedHeadOptions, CachedHeads
from ssmzoo.mixers._draws import SeededDraws
from ssmzoo.mixers._hyper import Hyper as Approximation
from ssmzoo.registry import register_mixer


@dataclasses.dataclass(kw_only=True)
class HyperOptions(CachedHeadOptions):
    """Beside those of :class:`~ssmzoo.mixers._cached_heads.CachedHeadOptions`; the defaults are the paper's.

    Attributes:
        lsh_num_projs: bits of the angular hash.
        block_size: queries and keys of a block, of the ones sorted by hash.
        sample_size: keys that are sampled for all queries of a head.
        min_seq_len: sequences, and parts of one in the causal recursion, up to this length are computed exactly.
        seed: of the hash and the samples.
        bidirectional: every token sees later ones too; there is then no state.
    """

    lsh_num_projs: int = 7
    block_size: int = 256
    sample_size: int = 256
    min_seq_len: int = 4096
    seed: int = 0
    bidirectional: bool = False


@register_mixer("hyper")
class Hyper(SeededDraws, CachedHeads):
    """Softmax attention whose large weights are found by hashing, and whose small ones are estimated from a sample.

    It approximates softmax attention. Queries and keys are sorted by an angular hash, so that similar ones come into
    blocks with the same number, B(i) for query i; the n sampled keys J of all m stand for the others::

        out_i = (Σ_{j ∈ B(i)} e^{s_ij} v_j + m/n Σ_{j ∈ J, j ∉ B(i)} e^{s_ij} v_j) / D_i,    s_ij = q_i · k_j / √d
        D_i = Σ_{j ∈ B(i)} e^{s_ij} + m/n Σ_{j ∈ J, j ∉ B(i)} e^{s_ij}

    Numerator and D are without bias over the samples, which are independent and uniform. Their error falls with the
    root of ``sample_size`` and grows with the spread of the weights outside of the blocks (theorem 1). Causal, a
    sequence is cut in half (algorithm 4): each half is computed likewise, and the second half's queries also meet the
    first half's keys as above. The time for a sequence of l tokens is O(l log l · (block_size + sample_size)).

    A token's output depends on where its sequence ends, though not on what comes after: that decides on the halves.

    Args:
        d_model: width of input and output.
        options: those of :class:`HyperOptions`.

    ``projections`` and ``samples`` are buffers: saved with the weights, not trained, drawn from ``seed`` and the
    layer's number. The state is a :class:`~ssmzoo.cache.kv.KVCache` of all tokens. **Tokens that go on from a filled
    state see all earlier ones exactly**: cut anywhere is then the same as whole only up to ``min_seq_len`` tokens, and
    beyond that nearer to exact attention.

    Raises:
        ValueError: sizes that do not fit together.
    """

    options_class = HyperOptions
    projections: Tensor  # (h, d, lsh_num_projs)
    samples: Tensor  # (h, sample_size), in parts of UNIT

    def __init__(self, d_model: int, **options: Any):
        o = HyperOptions(**options)
        super().__init__(d_model, o)
        self.check_at_least(1, lsh_num_projs=o.lsh_num_projs, block_size=o.block_size, sample_size=o.sample_size)
        self.check_at_least(0, min_seq_len=o.min_seq_len)
        if o.lsh_num_projs > 32:
            raise ValueError(f"Hyper: `lsh_num_projs` must be at most 32; got {o.lsh_num_projs}")
        self.block_size, self.sample_size, self.min_seq_len = o.block_size, o.sample_size, o.min_seq_len
        self.set_draws(
            o.seed,
            normal={"projections": (self.n_heads, self.head_dim, o.lsh_num_projs)},
            uniform={"samples": (self.n_heads, o.sample_size)},
        )

    def mixing_flops(self, context: int) -> float:
        """4 · n_heads · head_dim for each key that a query meets, sampled ones among them, and the hashes' products."""
        l = max(context, 1)
        met = self._met_causal(l) if self.causal else self._met(l, l)
        return self.n_heads * 4 * self.head_dim * met / l

    def _met(self, l: int, m: int) -> float:
        """Pairs of l queries and m keys; a product with the hash's projections is half of one."""
        if max(l, m) <= self.min_seq_len:
            return l * m
        return l * (min(m, self.block_size) + self.sample_size) + (l + m) * self.projections.shape[2] / 2

    def _met_causal(self, l: int) -> float:
        if l <= max(1, self.min_seq_len):
            return l * (l + 1) / 2
        half = l // 2
        return self._met_causal(half) + self._met_causal(l - half) + self._met(l - half, half)

    def whole(self, x: Tensor, places: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        approximation = Approximation(self.projections, self.samples, self.block_size, self.min_seq_len)
        return (approximation.causal if self.causal else approximation.unmasked)(q, k, v)[0]

    def further(self, q: Tensor, cache: KVCache, cu_seqlens: Tensor | None) -> Tensor:
        return newest(cache, q, Logits(1 / math.sqrt(self.head_dim)), cu_seqlens)
