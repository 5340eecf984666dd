"""Scalings of the rotary embedding that depend on how long a sequence is."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from ssmzoo.mixers._rope_scaling import Scaling, at_least_one
from ssmzoo.plain import short


@dataclasses.dataclass(frozen=True)
class DynamicScaling(Scaling):
    """NTK-aware scaling that grows with the sequence: nothing changes up to the trained context.

    For a sequence of L tokens, more than those, the base is multiplied by
    (factor · L / original - factor + 1)^(dim / (dim - 2)). As in transformers, L is the sequence's length at the end of
    a call, and keys in a cache stay as they entered it. So beyond the trained context outputs depend on how a sequence
    is cut into calls, and on tokens to come.

    Attributes:
        factor: how fast it grows.
        original_max_position_embeddings: the trained context, in tokens.
    """

    factor: float
    original_max_position_embeddings: int

    by_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least_one("factor", self.factor)
        at_least_one("original_max_position_embeddings", self.original_max_position_embeddings)

    def scale(self, frequency: Tensor, base: float, lengths: Tensor) -> Tensor:
        pairs = frequency.shape[0]
        longer = lengths.to(frequency.dtype).clamp(min=self.original_max_position_embeddings)
        growth = self.factor * longer / self.original_max_position_embeddings - (self.factor - 1)
        # base^(-i / pairs), times growth^(pairs / (pairs - 1)) raised to the same power
        power = torch.arange(pairs, device=frequency.device, dtype=frequency.dtype) / (pairs - 1)
        return frequency * growth[..., None] ** -power

    def check_dim(self, dim: int) -> None:
        if dim <= 2:
            raise ValueError(
                f"`rope_scaling` of type 'dynamic' needs more than 2 turning channels of a head; got {dim}"
            )


@dataclasses.dataclass(frozen=True)
class LongRopeScaling(Scaling):
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): each frequency divided by a factor of its own.

    There are two sets of factors, for sequences up to the trained context and for longer ones. As with
    :class:`DynamicScaling`, the length at the end of a call decides.

    Attributes:
        short_factor, long_factor: a factor for each pair.
        original_max_position_embeddings: the trained context, in tokens.
        factor: how many times longer the context becomes: cosines and sines are multiplied by
            √(1 + ln(factor) / ln(original_max_position_embeddings)).
        attention_factor: of cosines and sines, instead.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float = 1.0
    attention_factor: float | None = None

    by_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least_one("factor", self.factor)
        at_least_one("original_max_position_embeddings", self.original_max_position_embeddings)
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if not all(isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf for x in factors):
                raise ValueError(f"`rope_scaling`: `{name}` must hold numbers above 0; got {short(factors)}")
        if self.attention_factor is not None and not 0 < self.attention_factor < math.inf:
            raise ValueError(f"`rope_scaling`: `attention_factor` must be above 0; got {self.attention_factor}")
        if self.attention_factor is None and self.factor > 1 and self.original_max_position_embeddings == 1:
            raise ValueError("`rope_scaling`: `original_max_position_embeddings` must be above 1; got 1")

    @property
    def amplitude(self) -> float:  # type: ignore[override]
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))

    def scale(self, frequency: Tensor, base: float, lengths: Tensor) -> Tensor:
        near, far = (frequency / frequency.new_tensor(factors) for factors in (self.short_factor, self.long_factor))
        return torch.where((lengths > self.original_max_position_embeddings)[..., None], far, near)

    def check_dim(self, dim: int) -> None:
        for name in ("short_factor", "long_factor"):
            if 2 * len(getattr(self, name)) != dim:
                raise ValueError(
                    f"`rope_scaling`: `{name}` must hold a number for each of the {dim // 2} pairs of channels; got "
                    f"{len(getattr(self, name))}"
                )
