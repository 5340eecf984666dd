"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, section 3.2), in rotate-half form, and its scaling.

Channels i and i + dim/2 of a head are a pair, turned by the angle position · base^(-2i/dim), as in Llama. Scaling
lowers these frequencies, so that a model meets at far positions the angles that it was trained on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import unknown
from ssmzoo.options import check_options


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): every frequency divided by ``factor``."""

    factor: float

    amplitude = 1.0
    logit_factor = 1.0

    def __post_init__(self) -> None:
        _at_least_one("factor", self.factor)

    def scale(self, frequency: Tensor, base: float) -> Tensor:
        """The frequencies ``(dim / 2)``, scaled."""
        return frequency / self.factor


@dataclasses.dataclass(frozen=True)
class YarnScaling:
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
        _at_least_one("factor", self.factor)
        _at_least_one("original_max_position_embeddings", self.original_max_position_embeddings)
        for name in ("beta_slow", "mscale", "mscale_all_dim", "attention_factor"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
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
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is None or self.mscale_all_dim is None:
            return self._magnitude(1.0)
        return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)

    @property
    def logit_factor(self) -> float:
        """What a mixer multiplies all its logits by, beyond the cosines and sines."""
        return 1.0 if self.mscale_all_dim is None else self._magnitude(self.mscale_all_dim) ** 2

    def scale(self, frequency: Tensor, base: float) -> Tensor:
        """The frequencies ``(dim / 2)``, scaled."""
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
class ProportionalScaling:
    """Only the fastest pairs turn, with the frequencies that they have where all do; as in Gemma 4 and LFM3.

    Attributes:
        partial_rotary_factor: the share of all pairs that turn.
        factor: every frequency is divided by it.
    """

    partial_rotary_factor: float
    factor: float = 1.0

    amplitude = 1.0
    logit_factor = 1.0

    def __post_init__(self) -> None:
        _at_least_one("factor", self.factor)
        if not 0 <= self.partial_rotary_factor <= 1:
            raise ValueError(
                f"`rope_scaling`: `partial_rotary_factor` must be from 0 to 1; got {self.partial_rotary_factor}"
            )

    def scale(self, frequency: Tensor, base: float) -> Tensor:
        """The frequencies ``(dim / 2)``, scaled."""
        turning = int(self.partial_rotary_factor * frequency.shape[0])
        pair = torch.arange(frequency.shape[0], device=frequency.device)
        return torch.where(pair < turning, frequency / self.factor, 0)


RopeScaling = LinearScaling | YarnScaling | ProportionalScaling

KINDS: dict[str, type[LinearScaling] | type[YarnScaling] | type[ProportionalScaling]] = {
    "linear": LinearScaling,
    "yarn": YarnScaling,
    "proportional": ProportionalScaling,
}


def scaling_of(options: Mapping[str, Any] | None) -> RopeScaling | None:
    """A mixer's option ``rope_scaling``, checked.

    Args:
        options: ``rope_type``, "linear", "yarn" or "proportional", and the fields of :class:`LinearScaling`,
            :class:`YarnScaling` or :class:`ProportionalScaling`; or None for none.

    Raises:
        TypeError: a key that does not exist, or a value of the wrong type.
        ValueError: a key missing, or a value out of range.
    """
    if options is None:
        return None
    given = dict(options)
    if "rope_type" not in given:
        raise ValueError(f"`rope_scaling` must name its `rope_type`, one of {', '.join(KINDS)}; got {given}")
    kind = given.pop("rope_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(unknown("`rope_type` of `rope_scaling`", str(kind), KINDS))
    scaling = KINDS[kind]
    checked = check_options(f"`rope_scaling` of type {kind!r}", scaling, given)
    for field in dataclasses.fields(scaling):
        if field.default is dataclasses.MISSING and field.name not in checked:
            raise ValueError(f"`rope_scaling` of type {kind!r} needs `{field.name}`; got {given}")
    return scaling(**checked)


def rotary_angles(
    positions: Tensor, dim: int, base: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles, ``(b, l, 1, dim / 2)``, times the scaling's amplitude.

    Args:
        positions: integers, ``(b, l)``, or ``(1, l)`` for all alike.
        dim: how many channels of a head turn; even.
        base: the longest wavelength is about 2π · base positions.
        dtype: float32 or float64: half precision cannot tell far positions apart.
        scaling: what :func:`scaling_of` gives.
    """
    frequency = base ** (-torch.arange(0, dim, 2, device=positions.device, dtype=dtype) / dim)  # (dim/2)
    if scaling is not None:
        frequency = scaling.scale(frequency, base)
    angle = (positions[..., None] * frequency)[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    if scaling is None or scaling.amplitude == 1:
        return cos, sin
    return cos * scaling.amplitude, sin * scaling.amplitude


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the leading channels of each head of x ``(b, l, h, k)``; the rest stays."""
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def halves(x: Tensor) -> Tensor:
    """Channels laid out as pairs (2i, 2i + 1), as in the original paper, brought into the order of rotate-half."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _at_least_one(name: str, value: float) -> None:
    if not 1 <= value < math.inf:
        raise ValueError(f"`rope_scaling`: `{name}` must be at least 1; got {value}")
