"""What attention over cuts takes, what its backward pass gets as well, and where gradients are added up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels.core.validate import precision

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]  # of q, k, v and slopes


class Inputs(NamedTuple):
    """Of this process.

    Attributes:
        q: queries ``(l h k)``.
        k: keys ``(m h_kv k)``.
        v: values ``(m h_kv v)``.
        slopes: of ALiBi ``(h)``.
        sinks: a logit without a value for each head ``(h)``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    slopes: Tensor | None
    sinks: Tensor | None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Inputs:
        """Those of a call, whose tensors have one batch."""
        q, k, v = (given[name][0] for name in ("q", "k", "v"))
        return cls(q, k, v, given["alibi_slopes"], given["sinks"])

    @property
    def sizes(self) -> list[int]:
        """Channels of a token's keys, and of its values."""
        return [self.k.shape[1:].numel(), self.v.shape[1:].numel()]

    @property
    def both(self) -> Tensor:
        """Keys and values side by side ``(m, channels)``."""
        return torch.cat([self.k.flatten(1), self.v.flatten(1)], dim=1)

    def before_any_key(self) -> tuple[Tensor, Tensor]:
        """Output ``(l h v)`` and log-sum-exp ``(h l)`` over no keys, in the precision of sums."""
        (length, heads, _), wide = self.q.shape, precision(self.q)
        lse = self.q.new_full((heads, length), -torch.inf, dtype=wide)
        return self.q.new_zeros(length, heads, self.v.shape[2], dtype=wide), lse


class Results(NamedTuple):
    """Of attention over all keys, with sinks, and their gradients.

    Attributes:
        out: output ``(l h v)``.
        lse: log-sum-exp ``(h l)``.
        d_out: the output's gradient.
        d_lse: that of the log-sum-exp, if it has any.
    """

    out: Tensor
    lse: Tensor
    d_out: Tensor
    d_lse: Tensor | None

    @property
    def delta(self) -> Tensor:
        """What a logit's gradient has less than d_out · v: out · d_out - d_lse ``(l h)``."""
        product = (self.out * self.d_out).sum(-1)
        return product if self.d_lse is None else product - self.d_lse.T


class Sums(NamedTuple):
    """Where gradients are added up, in the precision of sums.

    Attributes:
        q: of queries ``(l h k)``.
        both: of keys and values ``(m, channels)``.
        slopes: ``(h)``.
    """

    q: Tensor
    both: Tensor
    slopes: Tensor | None

    @classmethod
    def of(cls, inputs: Inputs) -> Sums:
        """Zeros."""
        q, slopes, wide = inputs.q, inputs.slopes, precision(inputs.q)
        both = q.new_zeros(len(inputs.k), sum(inputs.sizes), dtype=wide)
        of_slopes = None if slopes is None else torch.zeros_like(slopes, dtype=wide)
        return cls(torch.zeros_like(q, dtype=wide), both, of_slopes)

    def gradients(self, inputs: Inputs) -> Gradients:
        """In the dtypes and shapes of these, but for slopes."""
        dk, dv = self.both.split(inputs.sizes, dim=1)
        of_keys = (x.reshape(like.shape).to(like.dtype) for x, like in ((dk, inputs.k), (dv, inputs.v)))
        return self.q.to(inputs.q.dtype), *of_keys, self.slopes
