"""Mamba-2's weights of one direction as they start, and what its options may be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmzoo.init import inverse_softplus_of_log_uniform, starting, wide_dtype
from ssmzoo.mixers._multipliers import Multipliers
from ssmzoo.plain import is_finite


class Direction(NamedTuple):
    """The weights of the convolution and the recurrence; a second direction has its own."""

    conv1d: nn.Module
    dt_bias: Tensor  # (h)
    A_log: Tensor  # (h)
    D: Tensor  # (h) or (d)


def new_weights(
    channels: int,
    d_conv: int,
    heads: int,
    skips: int,
    dt: tuple[float, float, float],
    A_init_range: tuple[float, float],
    conv_init: float | None,
    conv_bias: bool,
) -> tuple[nn.Conv1d, nn.Parameter, nn.Parameter, nn.Parameter]:
    """Fresh weights in the order of :class:`Direction`."""
    # Holds the weight and bias under their published names; the op does the convolution.
    conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, bias=conv_bias)
    if conv_init is not None:
        nn.init.uniform_(conv1d.weight, -conv_init, conv_init)
    dt_bias = nn.Parameter(inverse_softplus_of_log_uniform(heads, *dt))
    wide = wide_dtype()
    A_log = starting(heads, wide, lambda: torch.empty(heads, dtype=wide).uniform_(*A_init_range).log())
    return conv1d, dt_bias, nn.Parameter(A_log), nn.Parameter(torch.ones(skips, dtype=wide))


def multipliers_of(given: tuple[float, ...], splits: list[int], maps: int) -> Multipliers:
    """Those of z, x, B, C and δ; ``splits`` are the sizes of the input projection's parts, ``maps`` B's channels."""
    if len(given) != 5 or not all(isinstance(m, int | float) and is_finite(m) for m in given):
        raise ValueError(f"Mamba2: `multipliers` must be five finite numbers, of z, x, B, C and δ; got {given}")
    z, x, B, C, dt = given
    d_mlp, _, d_ssm, _, heads = splits
    return Multipliers(((2 * d_mlp, 1.0), (d_ssm, z), (d_ssm, x), (maps, B), (maps, C), (heads, dt)))


def check_divides(name: str, part: int, whole: int, of: str) -> None:
    if part < 1 or whole % part:
        raise ValueError(f"Mamba2: `{name}` must divide the {whole} {of}; got {part}")


def checked_range(name: str, pair: tuple[float, float], least: float) -> tuple[float, float]:
    numbers = len(pair) == 2 and all(isinstance(x, int | float) and not isinstance(x, bool) for x in pair)
    if not numbers or not least <= pair[0] <= pair[1]:
        raise ValueError(f"Mamba2: `{name}` must be (least, most) with {least:g} <= least <= most; got {pair}")
    return float(pair[0]), float(pair[1])
