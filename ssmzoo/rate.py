"""The time step of mixers in continuous time: a model runs at another sampling rate than it was trained at."""

from __future__ import annotations

import math

from torch import nn

from ssmzoo.mixer import Mixer


def set_rate(model: nn.Module, rate: float) -> None:
    """Resamples the time axis of every S4, S4D, S5 and Hyena layer in a model.

    Args:
        model: any module; layers of other kinds stay as they are.
        rate: the spacing of its inputs over that in training: 2.0 for every second sample, 0.5 for twice as many.

    Raises:
        ValueError: rate is not above 0, or there is no such layer.
    """
    check_rate("set_rate", rate)
    layers = [module for module in model.modules() if isinstance(module, Mixer) and module.has_rate]
    if not layers:
        raise ValueError(
            f"set_rate: `model` must have an S4, S4D, S5 or Hyena layer; got {type(model).__name__} without one"
        )
    for layer in layers:
        layer.rate = float(rate)  # type: ignore[assignment]


def check_rate(name: str, rate: float) -> None:
    """Raises ValueError, in the name of the caller, unless the rate is a number above 0."""
    if not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise ValueError(f"{name}: `rate` must be above 0; got {rate!r}")
