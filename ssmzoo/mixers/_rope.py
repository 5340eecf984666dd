"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, section 3.2), in rotate-half form, and its scaling.

Channels i and i + dim/2 of a head are a pair, turned by the angle position · base^(-2i/dim), as in Llama. Scaling
lowers these frequencies, so that a model meets at far positions the angles that it was trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.crossing import current
from ssmkernels.core.names import unknown
from ssmzoo.cache.tokens import owners
from ssmzoo.mixers._rope_by_length import DynamicScaling, LongRopeScaling
from ssmzoo.mixers._rope_scaling import LinearScaling, Llama3Scaling, ProportionalScaling, Scaling, YarnScaling
from ssmzoo.options import check_options

KINDS: dict[str, type[Scaling]] = {
    "linear": LinearScaling,
    "yarn": YarnScaling,
    "proportional": ProportionalScaling,
    "llama3": Llama3Scaling,
    "dynamic": DynamicScaling,
    "longrope": LongRopeScaling,
}


def scaling_of(options: Mapping[str, Any] | None, dim: int | None = None) -> Scaling | None:
    """A mixer's option ``rope_scaling``, checked.

    Args:
        options: ``rope_type``, one of :data:`KINDS`, and the fields of its class; or None for none.
        dim: how many channels of a head turn.

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
    cls = KINDS[kind]
    checked = check_options(f"`rope_scaling` of type {kind!r}", cls, given)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.name not in checked:
            raise ValueError(f"`rope_scaling` of type {kind!r} needs `{field.name}`; got {given}")
    scaling = cls(**checked)
    if dim is not None:
        scaling.check_dim(dim)
    return scaling


def rotary_angles(
    positions: Tensor,
    dim: int,
    base: float,
    dtype: torch.dtype,
    scaling: Scaling | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles, ``(b, l, 1, dim / 2)``, times the scaling's amplitude.

    Args:
        positions: integers, ``(b, l)``, or ``(1, l)`` for all alike.
        dim: how many channels of a head turn; even.
        base: the longest wavelength is about 2π · base positions.
        dtype: float32 or float64: half precision cannot tell far positions apart.
        scaling: what :func:`scaling_of` gives.
        cu_seqlens: borders of the packed sequences that the positions are of.
    """
    frequency = frequencies(dim, base, dtype, positions.device)
    if scaling is not None:
        lengths = _lengths(positions, cu_seqlens) if scaling.by_length else positions
        frequency = scaling.scale(frequency, base, lengths)
    angle = (positions[..., None] * frequency)[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    if scaling is None or scaling.amplitude == 1:
        return cos, sin
    return cos * scaling.amplitude, sin * scaling.amplitude


def frequencies(dim: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(dim / 2)``, in radians a token."""
    return base ** (-torch.arange(0, dim, 2, device=device, dtype=dtype) / dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the leading channels of each head of x ``(b, l, h, k)``; the rest stays."""
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def halves(x: Tensor) -> Tensor:
    """Channels laid out as pairs (2i, 2i + 1), as in the original paper, brought into the order of rotate-half."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _lengths(positions: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """How long the sequence of each token is after these tokens: ``(b, 1)``, or ``(1, l)`` packed."""
    if cu_seqlens is None:
        return positions[:, -1:] + 1
    row = owners(cu_seqlens, positions.shape[1])[0]
    lengths, over = positions[:, (cu_seqlens[1:] - 1)[row]] + 1, current()
    if over is None:
        return lengths
    return lengths + (over.totals - over.starts - cu_seqlens.diff())[row]  # tokens in later parts of it
