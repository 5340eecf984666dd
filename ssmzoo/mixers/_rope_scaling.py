"""Scalings of the rotary embedding's frequencies, so that a model meets at far positions angles that it was trained on.

Their names and fields are those of transformers' ``rope_parameters``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from ssmzoo.plain import is_finite


class Scaling:
    """What all scalings have.

    Attributes:
        amplitude: what cosines and sines are multiplied by.
        logit_factor: what a mixer multiplies all its logits by, beyond the cosines and sines.
        by_length: the frequencies depend on how long a sequence is.
    """

    amplitude: float = 1.0
    logit_factor: float = 1.0
    by_length: ClassVar[bool] = False

    def scale(self, frequency: Tensor, base: float, lengths: Tensor) -> Tensor:
        """The frequencies ``(dim / 2)``, scaled; ``(..., dim / 2)`` for lengths ``(...)`` if they depend on those."""
        raise NotImplementedError

    def check_dim(self, dim: int) -> None:
        """Raises ValueError where a head has not as many turning channels as the scaling needs."""


@dataclasses.dataclass(frozen=True)
class LinearScaling(Scaling):
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): every frequency divided by ``factor``."""

    factor: float

    def __post_init__(self) -> None:
        at_least_one("factor", self.factor)

    def scale(self, frequency: Tensor, base: float, lengths: Tensor) -> Tensor:
        return frequency / self.factor


@dataclasses.dataclass(frozen=True)
class YarnScaling(Scaling):
    """YaRN (Peng et al. 2023, arXiv 2309.00071, section 3): interpolates the slow pairs and leaves the fast ones.

    A pair that turns r times within the trained context keeps its frequency where r ≥ beta_fast, has it divided by
    ``factor`` where r ≤ beta_slow, and lies on a ramp over the pairs in between.

    Attributes:
        factor: how many times longer the context becomes.
        original_max_position_embeddings: the trained context, in tokens.
        beta_fast, beta_slow: the ramp's ends, in turns.
        mscale, mscale_all_dim: as DeepSeek-V2 tempers the softmax: with m(x) = 0.1 x ln(factor) + 1, the cosines
            and sines are multiplied by m(mscale) / m(mscale_all_dim), and where the mixer does so (``mla``) all logits
            by m(mscale_all_dim)². Given together, or not at all.
        attention_factor: of cosines and sines, instead; 0.1 ln(factor) + 1 if neither is given (the paper's √(1/t)).
        truncate: the ramp's ends are rounded outwards to whole pairs.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        at_least_one("factor", self.factor)
        at_least_one("original_max_position_embeddings", self.original_max_position_embeddings)
        for name in ("beta_slow", "mscale", "mscale_all_dim", "attention_factor"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and is_finite(value)):
                raise ValueError(f"`rope_scaling`: `{name}` must be above 0; got {value}")
        if not self.beta_slow < self.beta_fast < math.inf:
            raise ValueError(
                f"`rope_scaling`: `beta_fast` must be above beta_slow={self.beta_slow}; got {self.beta_fast}"
            )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            there, absent = (
                ("mscale", "mscale_all_dim") if self.mscale_all_dim is None else ("mscale_all_dim", "mscale")
            )
            raise ValueError(
                f"`rope_scaling`: `{there}` needs `{absent}`; got {there}={getattr(self, there)} without it"
            )

    @property
    def amplitude(self) -> float:  # type: ignore[override]
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is None or self.mscale_all_dim is None:
            return self._magnitude(1.0)
        return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)

    @property
    def logit_factor(self) -> float:  # type: ignore[override]
        return 1.0 if self.mscale_all_dim is None else self._magnitude(self.mscale_all_dim) ** 2

    def scale(self, frequency: Tensor, base: float, lengths: Tensor) -> Tensor:
        pairs = frequency.shape[0]
        low, high = self._pair(self.beta_fast, pairs, base), self._pair(self.beta_slow, pairs, base)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        pair = torch.arange(pairs, device=frequency.device, dtype=frequency.dtype)
        ramp = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
        return frequency * (1 - ramp + ramp / self.factor)

    def _pair(self, turns: float, pairs: int, base: float) -> float:
        """Which pair, as a real number, turns so many times within the trained context."""
        return pairs * math.log(self.original_max_position_embeddings / (2 * math.pi * turns)) / math.log(base)

    def _magnitude(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0


@dataclasses.dataclass(frozen=True)
class ProportionalScaling(Scaling):
    """Only the fastest pairs turn, with the frequencies that they have where all do; as in Gemma 4 and LFM3.

    Attributes:
        partial_rotary_factor: the share of all pairs that turn.
        factor: every frequency is divided by it.
    """

    partial_rotary_factor: float
    factor: float = 1.0

    def __post_init__(self) -> None:
        at_least_one("factor", self.factor)
        if not 0 <= self.partial_rotary_factor <= 1:
            raise ValueError(
                f"`rope_scaling`: `partial_rotary_factor` must be from 0 to 1; got {self.partial_rotary_factor}"
            )

    def scale(self, frequency: Tensor, base: float, lengths: Tensor) -> Tensor:
        turning = int(self.partial_rotary_factor * frequency.shape[0])
        pair = torch.arange(frequency.shape[0], device=frequency.device)
        return torch.where(pair < turning, frequency / self.factor, 0)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(Scaling):
    """As in Llama 3.1 (arXiv 2407.21783): slow pairs interpolated, fast ones left, and a blend of both between.

    Attributes:
        factor: slow frequencies are divided by it.
        original_max_position_embeddings: the trained context, in tokens.
        low_freq_factor: a pair that turns fewer times within the trained context is slow.
        high_freq_factor: one that turns more often is fast.
    """

    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        at_least_one("factor", self.factor)
        at_least_one("original_max_position_embeddings", self.original_max_position_embeddings)
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError(
                f"`rope_scaling`: 0 < `low_freq_factor` < `high_freq_factor` must hold; got {self.low_freq_factor} and "
                f"{self.high_freq_factor}"
            )

    def scale(self, frequency: Tensor, base: float, lengths: Tensor) -> Tensor:
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


def at_least_one(name: str, value: float) -> None:
    """Raises ValueError for a field that is not."""
    if not 1 <= value < math.inf:
        raise ValueError(f"`rope_scaling`: `{name}` must be at least 1; got {value}")
