"""Performer: attention with random features in place of the softmax (Choromanski et al. 2020, arXiv 2009.14794)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from ssmkernels.core.autocast import without_autocast
from ssmkernels.core.packing import spans
from ssmkernels.core.recompute import recomputed
from ssmkernels.core.validate import precision
from ssmzoo.mixers._favor import CHUNK, LOWEST, FeatureSums, absorb, causal, read
from ssmzoo.mixers._heads import HeadMixer, HeadOptions
from ssmzoo.registry import register_mixer

SEGMENT = 256  # tokens whose features are held at a time; they should fit in a cache


@dataclasses.dataclass(kw_only=True)
class PerformerOptions(HeadOptions):
    """Beside those of :class:`~ssmzoo.mixers._heads.HeadOptions`.

    Attributes:
        n_features: how many features each head has; the same for all heads.
        features: their kind; "hyperbolic" ones come in pairs.
        bidirectional: every token sees later ones too; there is then no state.
    """

    n_features: int = 256
    features: Literal["positive", "hyperbolic"] = "positive"
    bidirectional: bool = False


@register_mixer("performer")
class Performer(HeadMixer):
    """FAVOR+: attention whose cost grows linearly with length, with a state of a fixed size.

    It approximates softmax attention. With queries and keys divided by d^¼ and random w_1 … w_m, the kernel
    exp(q · k) is the expectation of φ(q) · φ(k), for either kind of features (lemma 1)::

        φ_r(x) = exp(w_r · x - |x|²/2) / √m                    "positive"
        φ_±r(x) = exp(± w_r · x - |x|²/2) / √(2 m)             "hyperbolic", of less variance

    so the estimate of the kernel is unbiased; the quotient of two such estimates, the output, is off by O(1/√m), and by
    more the longer queries and keys are. The w_r are normal, and orthogonal in groups of d (section 2.4).

    Args:
        d_model: width of input and output.
        options: those of :class:`PerformerOptions`.

    ``projection``, the w_r, is a buffer: saved with the weights, not trained, and redrawn by :meth:`redraw` alone.
    Unlike the authors' code no ε is added to features or normaliser: see ``_favor.py`` for what keeps them in range.

    Raises:
        ValueError: sizes that do not fit together.
    """

    options_class = PerformerOptions
    state_class = FeatureSums
    projection: Tensor  # (m, d), or (m / 2, d) for pairs

    def __init__(self, d_model: int, **options: Any):
        o = PerformerOptions(**options)
        super().__init__(d_model, o)
        self.check_at_least(1, n_features=o.n_features)
        self.n_features, self.hyperbolic = o.n_features, o.features == "hyperbolic"
        if self.hyperbolic and o.n_features % 2:
            raise ValueError(f"Performer: `n_features` must be even for hyperbolic features; got {o.n_features}")
        rows = o.n_features // 2 if self.hyperbolic else o.n_features
        self.register_buffer("projection", torch.empty(rows, self.head_dim))
        self.redraw()

    @torch.no_grad()
    def redraw(self) -> None:
        """Draws new random features in place, from PyTorch's generator. States made before mean nothing after."""
        if self.projection.is_meta:
            return
        rows, d = self.projection.shape
        like = self.projection.to(precision(self.projection))  # no half precision for QR
        blocks = [_random_rotation(d, like) for _ in range(-(-rows // d))]
        # A row of d independent normals has a norm of its own beside its direction.
        norms = torch.randn(rows, d, dtype=like.dtype, device=like.device).norm(dim=1, keepdim=True)
        self.projection.copy_(torch.cat(blocks)[:rows] * norms)

    def reset_parameters(self) -> None:
        """:meth:`redraw`, by the name that PyTorch's meta-device initialisers call after ``to_empty``."""
        self.redraw()

    def initial_state(self, batch_size: int, max_length: int | None = None) -> FeatureSums:
        self.check_has_state()
        return self._nothing(batch_size)

    def mixing_flops(self, context: int) -> float:
        """For each head 4 m d for the features (2 m d for pairs), 4 m (d + 1) to add to the sums and to read them.

        Causal, also (c - 1) (m + d + 1) for the queries and keys of a chunk of c tokens, in the mean over it.
        """
        d, m = self.head_dim, self.n_features
        projected = 4 * len(self.projection) * d
        within = (min(CHUNK, max(context, 1)) - 1) * (m + d + 1) if self.causal else 0
        return self.n_heads * (projected + 4 * m * (d + 1) + within)

    def mix(self, x: Tensor, state: FeatureSums | None, cu_seqlens: Tensor | None) -> tuple[Tensor, FeatureSums | None]:
        inputs = self._project(x)
        before = state
        if before is None:
            before = self._nothing(x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1)
        with without_autocast(x.device.type):  # it would round exponents to half precision
            out, after = (
                self._along(before, *inputs) if cu_seqlens is None else self._packed(before, *inputs, cu_seqlens)
            )
        y = self.out_proj(out.transpose(1, 2).flatten(2).to(x.dtype))
        return y, None if state is None else after

    def _packed(
        self, state: FeatureSums, queries: Tensor, keys: Tensor, values: Tensor, cu_seqlens: Tensor
    ) -> tuple[Tensor, FeatureSums]:
        outs, states = [values[..., :0, :-1]], [state.select([])]
        for i, time in spans(cu_seqlens):
            out, after = self._along(state.select([i]), *(t[:, :, time] for t in (queries, keys, values)))
            outs.append(out)
            states.append(after)
        sums, logs = torch.cat([s.sums for s in states]), torch.cat([s.logs for s in states])
        return torch.cat(outs, dim=-2), FeatureSums(sums, logs)

    def _along(self, state: FeatureSums, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, FeatureSums]:
        """Queries and keys (b h l d) and values beside a 1 (b h l d+1) → (b h l d), and the sums after."""
        if queries.shape[-2] == 0:
            return values[..., :-1], state
        parts = list(zip(*(t.split(SEGMENT, dim=-2) for t in (queries, keys, values)), strict=True))
        outs = []
        if self.causal:
            for part in parts:
                out, state = recomputed(self._advance, state, *part)
                outs.append(out)
        else:
            for _, k, v in parts:
                state = recomputed(self._absorb, state, k, v)
            outs = [recomputed(self._read, state, q) for q, _, _ in parts]
        return torch.cat(outs, dim=-2), state

    def _advance(self, state: FeatureSums, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, FeatureSums]:
        if q.shape[-2] == 1:
            state = self._absorb(state, k, v)
            return self._read(state, q), state
        return causal(state, self._log_features(q), self._log_features(k) - _half_square(k), v)

    def _absorb(self, state: FeatureSums, k: Tensor, v: Tensor) -> FeatureSums:
        return absorb(state, self._log_features(k) - _half_square(k), v)

    def _read(self, state: FeatureSums, q: Tensor) -> Tensor:
        return read(state, self._log_features(q))

    def _log_features(self, x: Tensor) -> Tensor:
        """(b h l d) → (b h l m), but for -|x|²/2, which cancels in the quotient for queries."""
        along = x @ self.projection.to(x.dtype).mT
        return torch.cat([along, -along], dim=-1) if self.hyperbolic else along

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys divided by d^¼ (b h l d), and values beside a 1 (b h l d+1)."""
        q, k, v = (
            self.heads_of(x, p).transpose(1, 2).to(precision(x)) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q * self.head_dim**-0.25, k * self.head_dim**-0.25, torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)

    def _nothing(self, sequences: int) -> FeatureSums:
        shape = (sequences, self.n_heads, self.n_features, self.head_dim + 1)
        sums = self.like(wide=True).new_zeros(shape)
        return FeatureSums(sums, torch.full_like(sums[..., 0], LOWEST))


def _half_square(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True) / 2


def _random_rotation(size: int, like: Tensor) -> Tensor:
    """An orthogonal matrix, all equally likely; the signs of R make it so (Mezzadri 2006, arXiv math-ph/0609050)."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=like.dtype, device=like.device))
    return q * r.diagonal().sign()
